"""Plays gcloud: records calls, keeps a queued resource, runs what goes to workers.

$FAKE holds: `calls` (one JSON list a line), `states` (what the next looks at the
request see, one a line; then ACTIVE), `state`, and a home for each of two workers.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

FAKE = pathlib.Path(os.environ["FAKE"])
STATE = FAKE / "state"


def next_state() -> str:
    """What the request is at this look: one of the planned states, then ACTIVE."""
    planned = (FAKE / "states").read_text().split()
    if planned:
        (FAKE / "states").write_text("\n".join(planned[1:]))
        STATE.write_text(planned[0])
    elif STATE.read_text() in ("WAITING_FOR_RESOURCES", "PROVISIONING"):
        STATE.write_text("ACTIVE")
    return STATE.read_text()


def workers(flags: dict[str, str]) -> list[pathlib.Path]:
    names = ("0", "1") if flags["worker"] == "all" else (flags["worker"],)
    return [FAKE / f"worker{name}" for name in names]


def main(arguments: list[str]) -> int:
    with open(FAKE / "calls", "a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    assert arguments[:2] == ["compute", "tpus"], arguments
    flags = dict(
        argument[2:].split("=", 1) if "=" in argument else (argument[2:], "")
        for argument in arguments
        if argument.startswith("--")
    )
    there = STATE.exists()
    match arguments[2:4]:
        case ["queued-resources", "create"]:
            if there:
                print("ALREADY_EXISTS", file=sys.stderr)
                return 1
            STATE.write_text("WAITING_FOR_RESOURCES")
        case ["queued-resources", "describe"]:
            if not there:
                print("ERROR: NOT_FOUND: no such resource", file=sys.stderr)
                return 1
            print(next_state())
        case ["queued-resources", "delete"]:
            STATE.unlink()
            for worker in FAKE.glob("worker*"):
                # What still ends there may write once more.
                while worker.exists():
                    shutil.rmtree(worker, ignore_errors=True)
        case ["tpu-vm", "scp"]:
            for worker in workers(flags):
                worker.mkdir(exist_ok=True)
                shutil.copy(arguments[4], worker)
        case ["tpu-vm", "ssh"]:
            # As of a TPU that was taken away.
            if not there or STATE.read_text() != "ACTIVE":
                return 255
            codes = []
            for worker in workers(flags):
                worker.mkdir(exist_ok=True)
                home = os.environ | {"HOME": str(worker)}
                command = ["bash", "-c", flags["command"]]
                codes.append(subprocess.run(command, cwd=worker, env=home).returncode)
            return max(codes)
        case unknown:
            raise AssertionError(unknown)
    return 0


sys.exit(main(sys.argv[1:]))
