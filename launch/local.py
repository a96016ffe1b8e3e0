"""Starts N processes of one run on this machine.

python launch/local.py N --config=... --workdir=...

Prefixes each line of output with the number of its process, passes SIGTERM, Ctrl-C and
SIGHUP on to all processes, and exits with the first exit code that is not 0. After one
process has failed, the others have two minutes to notice and to report it. On a machine
with GPUs, each process takes one.
"""

import ctypes
import functools
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

# Python imports from the directory of this script; the package is in the one above.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from resnet_jax.console import output

# Seconds that the other processes have after one has failed.
PATIENCE = 120


def main(argv: list[str], patience: float = PATIENCE) -> int:
    """Runs `resnet_jax.main` in several processes; returns the exit code.

    Args:
      argv: The command line: the name of the script, the number of processes, and the
        flags of `resnet_jax.main`.
      patience: Seconds that the other processes have after one has failed.
    """
    if len(argv) < 2 or not argv[1].isdigit() or int(argv[1]) < 1:
        sys.exit("Usage: python launch/local.py PROCESSES --config=... --workdir=...")
    count = int(argv[1])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", "-m", "resnet_jax.main", *argv[2:]]
    command += [f"--coordinator=localhost:{port}", f"--num_processes={count}"]
    processes = []

    def pass_on(number: int, _) -> None:
        for process in processes:
            process.send_signal(number)

    def show(i: int) -> None:
        for line in processes[i].stdout:
            output.say(f"[{i}] {line.rstrip()}")

    # Signals are blocked until the handlers are set, so that none is lost after the
    # first process has started. A signal that nohup or the shell made this launcher
    # ignore stays ignored, in the processes as well.
    numbers = {signal.SIGTERM} | {
        number
        for number in (signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    processes += [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Libraries and file names may print bytes that are not text.
            errors="backslashreplace",
            # JAX takes the GPU of this number.
            env={"JAX_LOCAL_DEVICE_IDS": str(i), **os.environ},
            # Ctrl-C in a terminal reaches only this launcher, which passes it on.
            start_new_session=True,
            preexec_fn=functools.partial(_prepare, numbers),
        )
        for i in range(count)
    ]
    for number in numbers:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    readers = [
        threading.Thread(target=show, args=(i,), daemon=True) for i in range(count)
    ]
    for reader in readers:
        reader.start()
    _wait(processes, patience)
    for reader in readers:
        # The wait has an end, as a process that outlived its parent may hold the pipe.
        reader.join(10)
    # A process that a signal killed has a negative code. Shells use 128 + signal.
    codes = [process.returncode for process in processes]
    codes = [128 - code if code < 0 else code for code in codes]
    return next((code for code in codes if code), 0)


def _prepare(numbers: set[signal.Signals]) -> None:
    """Unblocks signals in a new process, and lets it end if the launcher is killed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _wait(processes: list[subprocess.Popen], patience: float) -> None:
    """Waits for all processes; some time after one has failed, kills the others."""
    end = tell = math.inf
    while any(process.poll() is None for process in processes):
        if end == math.inf and any(process.returncode for process in processes):
            end = time.monotonic() + patience
            tell = time.monotonic() + output.SILENCE
        if time.monotonic() > tell:
            tell = math.inf
            running = [i for i, x in enumerate(processes) if x.returncode is None]
            output.say(f"waiting up to {patience} s for processes {running} to end")
        if time.monotonic() > end:
            for i, process in enumerate(processes):
                if process.poll() is None:
                    output.say(
                        f"[{i}] killed: it still ran {patience} s after another failed"
                    )
                    process.kill()
                    process.wait()
        time.sleep(0.1)


if __name__ == "__main__":
    output.command(main)
