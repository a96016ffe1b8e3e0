"""Starts the project's commands as processes, and reads the results of runs."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import psutil

ROOT = pathlib.Path(__file__).parents[2]

# The flags of a run that trains on digits for some seconds, and that has everything
# that a long run has.
SMALL = (
    "--config=configs/quickstart.py",
    "--config.model.overrides={'stage_sizes': (1, 1, 1)}",
    "--config.total.steps=40",
    "--config.optim.warmup.steps=5",
    "--config.evaluate.every.steps=15",
    "--config.checkpoint.every.steps=5",
    "--config.log_every.steps=1",
    "--config.ema_decay=0.9",
)


def start(workdir: pathlib.Path, *flags: str, **options) -> subprocess.Popen:
    """Starts `python -m resnet_jax.main`, with stdout and stderr in one pipe.

    Args:
      workdir: The workdir of the run.
      *flags: More flags of the command.
      **options: The options of `start_python`.
    """
    main = ("-m", "resnet_jax.main", f"--workdir={workdir}")
    return start_python(*main, *flags, **options)


def start_python(
    *arguments: str,
    stderr=subprocess.STDOUT,
    redirect: str = "",
    own_group: bool = False,
    **environment: str,
) -> subprocess.Popen:
    """Starts Python at the root of the project, with one CPU device by default.

    Args:
      *arguments: The arguments of Python.
      stderr: The argument of `subprocess.Popen`; stdout is a pipe.
      redirect: Redirections of a shell, such as ">&- 2>/dev/full".
      own_group: True makes the process the leader of a process group of its own.
      **environment: More environment variables.
    """
    environment = {
        # A new user's CPU is one device; the process of the tests has eight.
        "JAX_NUM_CPU_DEVICES": "1",
        # Programs are optimized as for a user; those of the tests are not (see
        # conftest.py).
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    # libtpu makes a process that has loaded it ignore SIGHUP, which new processes would
    # inherit.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    command = [sys.executable, "-u", *arguments]
    if redirect:
        command = ["sh", "-c", f'exec "$@" {redirect}', "sh", *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        process_group=0 if own_group else None,
    )


def finish(process: subprocess.Popen, timeout: float = 900) -> tuple[int, str]:
    """Waits for a process; returns its exit code and its unread output."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def run(workdir: pathlib.Path, *flags: str, **options) -> tuple[int, str]:
    """Runs the training command to its end; returns its exit code and output."""
    return finish(start(workdir, *flags, **options))


def run_python(*arguments: str, **options) -> tuple[int, str]:
    """Runs Python to its end; returns its exit code and output."""
    return finish(start_python(*arguments, **options))


def send_when(
    process: subprocess.Popen,
    pattern: str,
    number: signal.Signals,
    to_group: bool = False,
) -> tuple[int, str]:
    """Sends a signal to a process as soon as a line of its output matches.

    Args:
      process: The process.
      pattern: The regular expression that is searched in each line.
      number: The signal.
      to_group: True sends the signal to the whole process group.

    Returns:
      The exit code and the output.
    """
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            send = os.killpg if to_group else os.kill
            send(process.pid, number)
            break
    code, rest = finish(process)
    return code, "".join(lines) + rest


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Returns the worker processes of a run, which decode images."""
    workers = []
    for child in psutil.Process(process.pid).children():
        # A child may end meanwhile.
        with contextlib.suppress(psutil.Error):
            if "spawn_main" in " ".join(child.cmdline()):
                workers.append(child)
    return workers


def read_json(path: pathlib.Path) -> dict:
    """Reads a JSON file."""
    return json.loads(path.read_text())


def result(workdir: pathlib.Path) -> dict:
    """Reads `result.json` in a workdir."""
    return read_json(workdir / "result.json")


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the finished checkpoints in a workdir, in order."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def final_arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads all arrays of the last checkpoint: parameters, optimizer state, EMA, ..."""
    step = checkpoint_steps(workdir)[-1]
    path = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        # numpy arrays can be restored whatever devices the run had.
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = checkpointer.restore(path, restore_args=kinds)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_end(workdir: pathlib.Path, reference: pathlib.Path) -> None:
    """Asserts that two runs ended with the same bits in every array."""
    arrays, expected = final_arrays(workdir), final_arrays(reference)
    assert arrays.keys() == expected.keys()
    assert len(arrays) > 10
    for name, array in arrays.items():
        assert array.tobytes() == expected[name].tobytes(), name
    for key in ("top1", "loss", "step", "n_seen"):
        assert result(workdir)[key] == result(reference)[key]
