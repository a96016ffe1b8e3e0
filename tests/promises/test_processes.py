"""Several processes of one run: the same result, and one stop for all."""

import re
import signal

import numpy as np
import pytest

from tests import runs

FLAGS = (
    "--config=configs/quickstart.py",
    "--config.model.overrides={'stage_sizes': (1, 1, 1)}",
    "--config.total.steps=20",
    "--config.optim.warmup.steps=5",
    "--config.evaluate.every.steps=10",
    "--config.log_every.steps=1",
)


def launch(workdir, *flags):
    """Starts two processes of two devices each through launch/local.py."""
    return runs.start_python(
        "launch/local.py", "2", f"--workdir={workdir}", *flags, JAX_NUM_CPU_DEVICES="2"
    )


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    flags = (*FLAGS, "--config.total.steps=6")
    code, output = runs.finish(launch(tmp_path / "two", *flags))
    assert code == 0, output
    code, output = runs.run(tmp_path / "one", *flags, JAX_NUM_CPU_DEVICES="4")
    assert code == 0, output
    one, two = (runs.final_arrays(tmp_path / name) for name in ("one", "two"))
    for name, array in one.items():
        # Gloo adds up the gradients in another order than one process does; each step
        # lets what float32 rounds grow about tenfold, from 1e-7.
        scale = np.abs(array).max() + 1e-6
        assert np.abs(array - two[name]).max() <= 1e-3 * scale, name
    assert runs.result(tmp_path / "two")["n_seen"] == 360


@pytest.mark.slow
def test_sigterm_stops_all_processes_at_the_same_step(tmp_path):
    process = launch(tmp_path / "run", *FLAGS, "--config.total.steps=2000")
    code, output = runs.send_when(process, "step 8/", signal.SIGTERM)
    assert code == 143, output
    saved = re.findall(r"saved step (\d+);", output)
    assert saved and runs.checkpoint_steps(tmp_path / "run")[-1] == int(saved[0])
