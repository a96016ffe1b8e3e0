"""Real runs in processes of their own, for the tests that stop and break them."""

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

# Seconds of training on the digits, with everything that a long run has.
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
    """Starts `python -m resnet_jax.main`; stdout and stderr come as one pipe.

    The options are those of `start_python`.
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
    """Starts Python at the root of the project, with one device unless told.

    Args:
      arguments: The arguments of Python.
      stderr: As in `subprocess.Popen`; stdout is a pipe.
      redirect: Redirections of a shell, such as ">&- 2>/dev/full".
      own_group: Whether it leads a process group, whose number is its own.
      environment: Variables of the environment.
    """
    environment = {
        # One device, as a new user has; the tests themselves see eight.
        "JAX_NUM_CPU_DEVICES": "1",
        # Compiled as for a user; the tests themselves compile faster, see conftest.py.
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        **environment,
    }
    # libtpu, where a test has loaded it, lets this process ignore it.
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
    """Waits for a run; returns its exit code and what it still printed."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def run(workdir: pathlib.Path, *flags: str, **options) -> tuple[int, str]:
    """A whole run; returns its exit code and what it printed."""
    return finish(start(workdir, *flags, **options))


def run_python(*arguments: str, **options) -> tuple[int, str]:
    """Runs Python to its end; returns the exit code and what it printed."""
    return finish(start_python(*arguments, **options))


def send_when(
    process: subprocess.Popen,
    pattern: str,
    number: signal.Signals,
    to_group: bool = False,
) -> tuple[int, str]:
    """Sends a signal as soon as a line matches; returns exit code and the output.

    With `to_group`, all processes get it that the run has started.
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
    """The processes that a run has started to decode images."""
    found = []
    for child in psutil.Process(process.pid).children():
        # Others may end meanwhile.
        with contextlib.suppress(psutil.Error):
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def read_json(path: pathlib.Path) -> dict:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def result(workdir: pathlib.Path) -> dict:
    """What `result.json` holds."""
    return read_json(workdir / "result.json")


def checkpoint_steps(workdir: pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints of a workdir."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def final_arrays(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint: parameters, statistics, optimiser, EMA."""
    step = checkpoint_steps(workdir)[-1]
    path = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(path).item_metadata.tree
        # As numpy arrays, whatever the devices were that saved them.
        kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        tree = checkpointer.restore(path, restore_args=kinds)
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same_end(workdir: pathlib.Path, other: pathlib.Path) -> None:
    """Asserts that two runs ended with the same bits in every array."""
    arrays, others = final_arrays(workdir), final_arrays(other)
    assert arrays.keys() == others.keys()
    assert len(arrays) > 10
    for name, array in arrays.items():
        assert array.tobytes() == others[name].tobytes(), name
    for key in ("top1", "loss", "step", "n_seen"):
        assert result(workdir)[key] == result(other)[key]
