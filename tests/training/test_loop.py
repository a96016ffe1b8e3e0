"""The training loop: progressive resizing, and the imports that it waits for."""

import os
import signal
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from resnet_jax.errors import UserError
from resnet_jax.persistence.preemption import PreemptedError
from resnet_jax.training.loop import train
from tests.helpers import tiny


def test_importing_the_loop_does_not_import_the_plotting_library():
    code = "import resnet_jax.training.loop, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


SCHEDULE = {
    "first": 4,
    "last": 8,
    "start": {"steps": 1},
    "end": {"steps": 5},
    "multiple": 2,
}


def growing(**changes) -> ConfigDict:
    """Returns the config of six steps at 4, 4, 4, 6, 8 and 8 pixels."""
    steps = {"total": {"steps": 6}, "evaluate.every": {"steps": 3}}
    config = tiny.config({key: ConfigDict(value) for key, value in steps.items()})
    config.data.resize_schedule = ConfigDict(SCHEDULE | changes)
    return config


@pytest.mark.long
def test_a_stopped_run_of_growing_images_ends_with_the_same_result(tmp_path, capsys):
    whole = train(growing(), tmp_path / "whole")
    output = capsys.readouterr().out
    assert "sizes:      4, 6, 8 px, in this order" in output
    assert output.count("compiling for") == 2

    def stop(evaluation):
        if evaluation["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(PreemptedError):
        train(growing(), tmp_path / "stopped", callback=stop)
    capsys.readouterr()
    stopped = train(growing(), tmp_path / "stopped")
    assert capsys.readouterr().out.count("compiling for") == 1
    assert (stopped["loss"], stopped["top1"]) == (whole["loss"], whole["top1"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"until": 3}, r"There is no data\.resize_schedule\.until"),
        ({"last": 12}, r"resize_schedule\.last=12 must be data\.image_size=8"),
        ({"end": {"steps": 1}}, r"resize_schedule\.end=.* must be after its start"),
        ({"end": {"steps": 7}}, r"resize_schedule\.end=.* 7, .*config\.total.* only 6"),
        ({"end": {"days": 1}}, r"data\.resize_schedule\.end=.* is not a duration"),
        ({"first": 0}, r"resize_schedule\.first=0"),
    ],
)
def test_a_wrong_schedule_of_sizes_is_rejected(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(growing(**changes), tmp_path)


def test_a_schedule_of_sizes_without_a_start_is_rejected(tmp_path):
    config = growing()
    del config.data.resize_schedule["start"]
    with pytest.raises(UserError, match="first, last, start, end, but no start"):
        train(config, tmp_path)
