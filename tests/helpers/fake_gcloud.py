"""A fake gcloud program, which runs the commands for workers on this machine.

It records every call and keeps a queued resource. The directory $FAKE holds `calls`
(the arguments of each call, a JSON list per line), `states` (the states that the next
looks at the request report, one per line; after them, ACTIVE), `state` (the current
state, if the request exists), and a home directory for each of two workers.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys


def next_state(fake: pathlib.Path) -> str:
    """Advances and returns the state: the next planned one, and finally ACTIVE."""
    planned = (fake / "states").read_text().split()
    state = fake / "state"
    if planned:
        (fake / "states").write_text("\n".join(planned[1:]))
        state.write_text(planned[0])
    elif state.read_text() in ("WAITING_FOR_RESOURCES", "PROVISIONING"):
        state.write_text("ACTIVE")
    return state.read_text()


def workers(fake: pathlib.Path, flags: dict[str, str]) -> list[pathlib.Path]:
    """Returns the home directories of the workers that --worker names."""
    names = ("0", "1") if flags["worker"] == "all" else (flags["worker"],)
    return [fake / f"worker{name}" for name in names]


def main(arguments: list[str]) -> int:
    """Does what gcloud would do; returns the exit code."""
    fake = pathlib.Path(os.environ["FAKE"])
    with open(fake / "calls", "a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    assert arguments[:2] == ["compute", "tpus"], arguments
    flags = dict(
        argument[2:].split("=", 1) if "=" in argument else (argument[2:], "")
        for argument in arguments
        if argument.startswith("--")
    )
    state = fake / "state"
    exists = state.exists()
    match arguments[2:4]:
        case ["queued-resources", "create"]:
            if exists:
                print("ALREADY_EXISTS", file=sys.stderr)
                return 1
            state.write_text("WAITING_FOR_RESOURCES")
        case ["queued-resources", "describe"]:
            if not exists:
                print("ERROR: NOT_FOUND: no such resource", file=sys.stderr)
                return 1
            print(next_state(fake))
        case ["queued-resources", "delete"]:
            state.unlink()
            for worker in fake.glob("worker*"):
                # Processes that still run there may create files during the removal.
                while worker.exists():
                    shutil.rmtree(worker, ignore_errors=True)
        case ["tpu-vm", "scp"]:
            for worker in workers(fake, flags):
                worker.mkdir(exist_ok=True)
                shutil.copy(arguments[4], worker)
        case ["tpu-vm", "ssh"]:
            # ssh fails like this when the TPU has been taken away.
            if not exists or state.read_text() != "ACTIVE":
                return 255
            codes = []
            for worker in workers(fake, flags):
                worker.mkdir(exist_ok=True)
                home = os.environ | {"HOME": str(worker)}
                command = ["bash", "-c", flags["command"]]
                codes.append(subprocess.run(command, cwd=worker, env=home).returncode)
            return max(codes)
        case unknown:
            raise AssertionError(unknown)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
