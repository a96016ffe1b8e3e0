"""The training loop: progressive resizing, and the imports that it waits for."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_jax.errors import UserError
from resnet_jax.persistence import metric_writers, storage
from resnet_jax.persistence.checkpoints import open_checkpoints
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


def overflowing(tmp_path, eval_images, **changes) -> dict:
    """Trains on black images, and evaluates on others, which overflow unless black."""
    config = tiny.config({"data.mean": (0.0,), "data.std": (1.2e-38,), **changes})
    images, labels = np.zeros((32, 8, 8), np.uint8), np.arange(32) % 10
    return train(
        config, tmp_path, data=(images, labels), eval_data=(eval_images, labels)
    )


def test_an_evaluation_whose_loss_is_not_finite_is_never_the_best(tmp_path, capsys):
    white = np.full((32, 8, 8), 255, np.uint8)
    every_step = ConfigDict({"steps": 1})
    result = overflowing(tmp_path, white, **{"evaluate.every": every_step})
    assert not np.isfinite(result["loss"])
    assert result["best"] is None
    text = (tmp_path / "result.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["best"] is None
    assert capsys.readouterr().out.count("is not finite at step") == 4
    with open_checkpoints(storage.path_of(tmp_path)) as saved:
        assert (saved.steps()[-1], saved.best_step()) == (4, None)


def test_an_evaluation_after_one_that_is_not_finite_can_be_the_best(tmp_path):
    results = []

    class Fading:
        """Images that are white until the first evaluation has ended."""

        classes = tuple("0123456789")

        def __len__(self):
            return 32

        def __getitem__(self, index):
            return np.full((8, 8, 1), 0 if results else 255, np.uint8), index % 10

    config = tiny.config({"data.mean": (0.0,), "data.std": (1.2e-38,)})
    config.data.cache = "none"
    config.evaluate.every = ConfigDict({"steps": 2})
    images, labels = np.zeros((32, 8, 8), np.uint8), np.arange(32) % 10
    data = {"data": (images, labels), "eval_data": Fading()}
    result = train(config, tmp_path, callback=results.append, **data)
    assert [np.isfinite(result["loss"]) for result in results] == [False, True]
    assert result["best"]["step"] == 4


def test_a_plateau_does_not_take_a_loss_that_is_not_finite_for_progress(tmp_path):
    white = np.full((32, 8, 8), 255, np.uint8)
    overflowing(
        *(tmp_path, white),
        **{"evaluate.every": ConfigDict({"steps": 1})},
        **{"optim.schedule": "plateau", "optim.patience": 0},
    )
    rows = metric_writers.read_metrics(tmp_path)
    rates = [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]
    assert rates[1:] == pytest.approx([rate / 10 for rate in rates[:-1]])


def test_a_schedule_of_sizes_without_a_start_is_rejected(tmp_path):
    config = growing()
    del config.data.resize_schedule["start"]
    with pytest.raises(UserError, match="first, last, start, end, but no start"):
        train(config, tmp_path)
