"""Starts training runs of several processes on this machine, as on a TPU pod."""

import pathlib
import socket
import subprocess

from tests.helpers import runs

# The arguments of Python that start the training command.
MAIN = ("-m", "resnet_jax.main")


def start(
    number: int,
    workdir: pathlib.Path,
    *flags: str,
    devices: int = 2,
    extra_flags: dict[int, list[str]] | None = None,
    main: tuple[str, ...] = MAIN,
    environments: dict[int, dict[str, str]] | None = None,
    own_group: bool = False,
) -> list[subprocess.Popen]:
    """Starts the processes of one run.

    Args:
      number: The number of processes.
      workdir: The workdir of the run.
      *flags: Flags of all processes.
      devices: The number of CPU devices of each process.
      extra_flags: More flags of single processes, by the index of the process.
      main: The arguments of Python that start the program.
      environments: Environment variables of single processes, by index.
      own_group: True makes each process the leader of a process group of its own.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = [f"--workdir={workdir}"]
    common += [f"--coordinator=localhost:{port}"] if number > 1 else []
    return [
        runs.start_python(
            *main,
            *common,
            *((f"--num_processes={number}", f"--process_id={i}")[: 2 * (number > 1)]),
            *flags,
            *(extra_flags or {}).get(i, []),
            own_group=own_group,
            **{"JAX_NUM_CPU_DEVICES": str(devices)} | (environments or {}).get(i, {}),
        )
        for i in range(number)
    ]


def finish(
    processes: list[subprocess.Popen], timeout: float = 900
) -> list[tuple[int, str]]:
    """Waits for all processes; returns the exit code and the output of each."""
    try:
        return [runs.finish(process, timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()


def run(number: int, workdir: pathlib.Path, *flags: str, **options) -> list[str]:
    """Runs all processes, which must succeed; returns the output of each."""
    ends = finish(start(number, workdir, *flags, **options))
    assert [code for code, _ in ends] == [0] * number, ends
    return [output for _, output in ends]


def wait_for(process: subprocess.Popen, text: str) -> str:
    """Reads the output until a line contains the text; returns what was read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"The output has no {text!r}: {''.join(lines)}")


def errors(output: str) -> list[str]:
    """Returns the error messages in the output of a process."""
    return [line for line in output.splitlines() if line.startswith("error: ")]
