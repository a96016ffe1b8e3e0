"""Runs of several processes on this machine, each with an output of its own."""

import pathlib
import socket
import subprocess

from tests.helpers import runs

# `python -m resnet_jax.main`, or a script that calls it.
MAIN = ("-m", "resnet_jax.main")


def start(
    number: int,
    workdir: pathlib.Path,
    *flags: str,
    devices: int = 2,
    of_each: dict[int, list[str]] | None = None,
    main: tuple[str, ...] = MAIN,
    environments: dict[int, dict[str, str]] | None = None,
    own_group: bool = False,
) -> list[subprocess.Popen]:
    """Starts the processes of one run.

    `of_each` and `environments` have more flags and variables, by process; with
    `own_group`, each leads a process group.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    told = [f"--workdir={workdir}"]
    told += [f"--coordinator=localhost:{port}"] if number > 1 else []
    return [
        runs.start_python(
            *main,
            *told,
            *((f"--num_processes={number}", f"--process_id={i}")[: 2 * (number > 1)]),
            *flags,
            *(of_each or {}).get(i, []),
            own_group=own_group,
            **{"JAX_NUM_CPU_DEVICES": str(devices)} | (environments or {}).get(i, {}),
        )
        for i in range(number)
    ]


def finish(
    processes: list[subprocess.Popen], timeout: float = 900
) -> list[tuple[int, str]]:
    """Waits for all; returns exit code and output of each."""
    try:
        return [runs.finish(process, timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def run(number: int, workdir: pathlib.Path, *flags: str, **options) -> list[str]:
    """A whole run that succeeds; returns what each process printed."""
    ends = finish(start(number, workdir, *flags, **options))
    assert [code for code, _ in ends] == [0] * number, ends
    return [output for _, output in ends]


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Reads until a line has the text; returns what was read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in {''.join(lines)}")


def errors(output: str) -> list[str]:
    """The lines that say why a process stopped."""
    return [line for line in output.splitlines() if line.startswith("error: ")]
