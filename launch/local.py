"""Starts N processes of one run on this machine.

python launch/local.py N --config=... --workdir=...

Prefixes each line with its process, passes SIGTERM and Ctrl-C on, and returns the first
exit code that is not 0.
"""

import signal
import socket
import subprocess
import sys
import threading


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
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Ctrl-C in a terminal reaches only this launcher, which passes it on.
            start_new_session=True,
        )
        for i in range(count)
    ]

    def pass_on(number: int, _) -> None:
        for process in processes:
            process.send_signal(number)

    def show(i: int) -> None:
        for line in processes[i].stdout:
            print(f"[{i}] {line}", end="", flush=True)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    readers = [threading.Thread(target=show, args=(i,)) for i in range(count)]
    for reader in readers:
        reader.start()
    codes = [process.wait() for process in processes]
    for reader in readers:
        reader.join()
    # A process that a signal killed has a negative code; shells say 128 + signal.
    codes = [128 - code if code < 0 else code for code in codes]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
