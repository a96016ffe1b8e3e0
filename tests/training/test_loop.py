"""The loop: what it tells of its speed, and progressive resizing."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from resnet_jax.errors import UserError
from resnet_jax.persistence.checkpoints import Progress
from resnet_jax.persistence.metric_writers import Writer
from resnet_jax.persistence.preemption import PreemptedError
from resnet_jax.training.experiment import summary
from resnet_jax.training.loop import Meter, train
from tests.helpers import tiny


class Rows(Writer):
    """Keeps what a writer would write."""

    def __init__(self):
        self.values = []

    def train(self, step, values, eta):
        self.values.append(values)


@pytest.mark.parametrize(
    ("norm", "told"), [("batch", "groups of 2 images, 8 a batch"), ("group", "none")]
)
def test_the_summary_tells_the_groups_of_batch_norm_where_there_is_one(norm, told):
    changes = {"model.overrides.norm": norm, "model.overrides.norm_groups": 8}
    told_of = summary(tiny.setup(changes), pathlib.Path("runs"))
    assert re.search(r"^batch norm: +(.*)$", told_of, re.MULTILINE)[1] == told


def test_a_start_does_not_wait_for_what_draws():
    code = "import resnet_jax.training.loop, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("fetching", "told"), [(0.2, 1), (0.0, 0)])
def test_devices_that_wait_for_data_are_told_once(fetching, told, caplog):
    rows = Rows()
    progress = Progress()
    meter = Meter(tiny.setup(), progress, rows)
    # The first time is the start of the loader.
    for _ in range(3):
        for _ in range(3):
            with meter.waiting():
                if fetching:
                    time.sleep(fetching)
            # The computation takes no time: the devices are done at once.
            meter.add({key: jnp.ones(()) for key in ("loss", "top1", "grad_norm")})
            time.sleep(0.05)
            progress.step += 1
        meter.flush()
    assert caplog.text.count("The devices waited for images") == told
    expected = fetching / (fetching + 0.05)
    assert rows.values[-1]["data_wait"] == pytest.approx(expected, abs=0.2)


def test_fetching_while_the_devices_work_is_no_waiting():
    class Busy:
        def is_ready(self):
            return False

    meter = Meter(tiny.setup(), Progress(), Rows())
    meter.add({"loss": Busy()})
    with contextlib.ExitStack() as stack:
        stack.enter_context(meter.waiting())
        time.sleep(0.02)
    assert meter._waited == 0


SCHEDULE = {
    "first": 4,
    "last": 8,
    "start": {"steps": 1},
    "end": {"steps": 5},
    "multiple": 2,
}


def growing(**changes) -> ConfigDict:
    """Six steps at 4, 4, 4, 6, 8 and 8 pixels."""
    config = tiny.config({"total": ConfigDict({"steps": 6})})
    config.data.resize_schedule = ConfigDict(SCHEDULE | changes)
    return config


@pytest.mark.long
def test_a_run_of_growing_images_ends_the_same_when_it_was_stopped(
    tmp_path, monkeypatch, capsys
):
    whole = train(growing(), tmp_path / "whole")
    told = capsys.readouterr().out
    assert "sizes:      4, 6, 8 px, in this order" in told
    assert told.count("compiling for") == 2

    tick = Writer.tick

    def stop(self, step):
        tick(self, step)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "tick", stop)
        with pytest.raises(PreemptedError):
            train(growing(), tmp_path / "stopped")
    capsys.readouterr()
    stopped = train(growing(), tmp_path / "stopped")
    assert capsys.readouterr().out.count("compiling for") == 1
    assert (stopped["loss"], stopped["top1"]) == (whole["loss"], whole["top1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"until": 3}, r"There is no data\.resize_schedule\.until"),
        ({"last": 12}, r"resize_schedule\.last=12 must be data\.image_size=8"),
        ({"end": {"steps": 1}}, r"resize_schedule\.end=.* must be behind its start"),
        ({"end": {"steps": 7}}, r"resize_schedule\.end=.* 7, .*config\.total.* only 6"),
        ({"end": {"days": 1}}, r"data\.resize_schedule\.end=.* is not a duration"),
        ({"first": 0}, r"resize_schedule\.first=0"),
    ],
)
def test_a_wrong_schedule_of_sizes_is_told(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(growing(**changes), tmp_path)


def test_a_schedule_of_sizes_lacks_nothing(tmp_path):
    config = growing()
    del config.data.resize_schedule["start"]
    with pytest.raises(UserError, match="first, last, start, end, but no start"):
        train(config, tmp_path)
