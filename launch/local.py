"""Starts N processes of one run on this machine.

python launch/local.py N --config=... --workdir=...

Prefixes each line with its process, passes SIGTERM, Ctrl-C and SIGHUP on, and returns
the first exit code that is not 0. Where one process fails, the others get two minutes
to notice and to say so. With GPUs, each process takes one.
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

# Python looks beside this script, and not in the directory above it.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from resnet_jax.console import output

PATIENCE = 120  # seconds


def main(argv: list[str]) -> int:
    """Runs `resnet_jax.main` N times with the given flags; returns the exit code."""
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

    # No signal may come between the first start and the handlers. What nohup or the
    # shell let this launcher ignore stays ignored, in the processes as well.
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
            # Libraries and names of files bring any bytes.
            errors="backslashreplace",
            # Which of the machine's GPUs JAX takes.
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
    _wait(processes)
    for reader in readers:
        # Not for ever: a process that outlived its parent may hold the pipe open.
        reader.join(10)
    # A process that a signal killed has a negative code; shells say 128 + signal.
    codes = [process.returncode for process in processes]
    codes = [128 - code if code < 0 else code for code in codes]
    return next((code for code in codes if code), 0)


def _prepare(numbers: set[signal.Signals]) -> None:
    """In each process: takes signals again, and ends when this launcher is killed."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _wait(processes: list[subprocess.Popen]) -> None:
    """Waits for all; some time after one has failed, kills those that are left."""
    end = math.inf
    while any(process.poll() is None for process in processes):
        if end == math.inf and any(process.returncode for process in processes):
            end = time.monotonic() + PATIENCE
        if time.monotonic() > end:
            for i, process in enumerate(processes):
                if process.poll() is None:
                    output.say(f"[{i}] killed: it ran on after another had failed")
                    process.kill()
                    process.wait()
        time.sleep(0.1)


if __name__ == "__main__":
    output.command(main)
