"""Runs that end early: at a target, or without a new best for too long."""

import json
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_jax.errors import UserError
from resnet_jax.persistence import metric_writers, storage
from resnet_jax.persistence.checkpoints import open_checkpoints
from resnet_jax.persistence.preemption import PreemptedError
from resnet_jax.training import stopping
from resnet_jax.training.loop import train
from tests.helpers import tiny

NAN = float("nan")


def stop(patience: int = 0, **target: float) -> ConfigDict:
    """Returns a section `stop`."""
    return ConfigDict({"patience": patience, "target": target})


def ended_after(section: ConfigDict, top1s, losses=None) -> list[str]:
    """Returns the reason to end after each of some evaluations."""
    memory, reasons = None, []
    for step, top1 in enumerate(top1s, start=1):
        figures = {"top1": top1, "top5": 1.0, "loss": (losses or top1s)[step - 1]}
        memory = stopping.after(memory, figures, step=step, seconds=0.5 * step)
        # A checkpoint holds JSON, in which a loss that is not finite is null.
        memory = json.loads(storage.to_json(memory))
        reasons.append(stopping.reason(section, step, memory))
    return reasons


# The rules.


def test_one_evaluation_more_than_the_tolerated_ones_ends_a_run():
    top1s = [0.2, 0.3, 0.3, 0.1, 0.4, 0.4, 0.2, 0.3]
    # The best is 0.3 for two evaluations more, and 0.4 for three.
    assert ended_after(stop(2), top1s) == [""] * 7 + ["patience"]
    assert ended_after(stop(1), top1s)[3] == "patience"
    assert ended_after(stop(0), top1s) == [""] * 8


def test_a_loss_that_is_not_finite_is_no_improvement_and_no_target():
    section = stop(1, top1=0.5)
    reasons = ended_after(section, [0.1, 0.9, 0.9], [1.0, NAN, NAN])
    assert reasons == ["", "", "patience"]


def test_all_figures_of_a_target_must_be_reached_by_one_evaluation():
    section = stop(top1=0.5, loss=0.7)
    top1s, losses = [0.6, 0.4, 0.5], [0.8, 0.6, 0.7]
    assert ended_after(section, top1s, losses) == ["", "", "target"]


def test_only_the_evaluation_of_the_present_step_ends_a_run():
    figures = {"top1": 0.9, "top5": 1.0, "loss": 0.1}
    memory = stopping.after(None, figures, step=4, seconds=2.0)
    assert stopping.reason(stop(top1=0.5), 4, memory) == "target"
    assert stopping.reason(stop(top1=0.5), 5, memory) == ""
    assert stopping.reason(stop(top1=0.5), 4, None) == ""


def test_a_run_of_an_older_version_counts_from_its_best_evaluation():
    figures = {"top1": 0.5, "top5": 1.0, "loss": 0.1}
    old = {"top1": 0.6, "loss": 0.2, "step": 2}
    assert stopping.after(None, figures, step=4, seconds=2.0, best=old) == {
        "best": 0.6,
        "bad": 1,
        "last": {"step": 4, "seconds": 2.0, **figures},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stop.target": {"top_1": 0.9}}, r"no figure 'top_1'\. Did you mean top1"),
        ({"stop.target": {"top-1": 0.9}}, r"no figure 'top-1'\. Did you mean top1"),
        ({"stop.target": {"accuracy": 0.9}}, r"Known: top1, top5, loss"),
        ({"stop.target": {"top1": 95}}, r"stop\.target\.top1=95 must be from 0 to 1"),
        ({"stop.target": {"loss": -1.0}}, r"stop\.target\.loss=-1\.0 must be at lea"),
        ({"stop.target": {"top1": "0.9"}}, r"top1='0\.9' is not a number"),
        ({"stop.patience": -1}, r"stop\.patience=-1 must be at least 0"),
        (
            {"stop.patience": 3, "evaluate.every": {"epochs": 0}},
            r"stop\.patience=3 .*evaluate\.every={'epochs': 0} evaluates only at the",
        ),
        (
            {"stop.target": {"top1": 0.5}, "evaluate.every": {"steps": 0}},
            r"stop\.target .*evaluate\.every={'steps': 0}",
        ),
        (
            {"stop.patience": 10, "optim.schedule": "plateau"},
            r"stop\.patience=10 .*optim\.schedule=plateau .*optim\.patience=10",
        ),
    ],
)
def test_rules_that_cannot_end_a_run_are_errors_that_name_the_keys(changes, message):
    changes = {
        key: ConfigDict(value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    with pytest.raises(UserError, match=message):
        tiny.setup(changes)


# Whole runs.


class Images:
    """Noise to evaluate on, which calls a function before an image is read."""

    classes = tuple("0123456789")

    def __init__(self, before: Callable[[int], None] = lambda read: None):
        self.before, self.read = before, 0

    def __len__(self):
        return 32

    def __getitem__(self, index):
        self.before(self.read)
        self.read += 1
        pixels = np.random.default_rng(index).integers(256, size=(8, 8, 1))
        return pixels.astype(np.uint8), index % 10


def run(workdir, images=None, callback=None, precise_bn=0, steps=12, **stop) -> dict:
    """Trains for 12 steps on noise, with an evaluation after every second one."""
    config = tiny.config({"precise_bn": precise_bn, "data.cache": "none"})
    config.optim.schedule = "constant"
    config.total = ConfigDict({"steps": steps})
    config.evaluate.every = ConfigDict({"steps": 2})
    for key, value in stop.items():
        config.stop[key] = ConfigDict(value) if isinstance(value, dict) else value
    # The loader reads the first image of an evaluation before the others.
    config.data.num_threads = 1
    noise = np.random.default_rng(0).integers(256, size=(64, 8, 8, 1))
    data = noise.astype(np.uint8), np.arange(64) % 10
    return train(
        config, workdir, data=data, eval_data=images or Images(), callback=callback
    )


def without_times(result: dict) -> dict:
    """Returns a result without times, speeds and places."""
    kept = {
        key: value
        for key, value in result.items()
        if key not in ("seconds", "images_per_second", "report")
    }
    to_target = kept["to_target"]
    return kept | {"to_target": to_target and to_target["steps"]}


def final_arrays(workdir) -> dict:
    """Returns the checksums of the arrays of the newest checkpoint."""
    with open_checkpoints(storage.path_of(workdir)) as saved:
        return saved.read(saved.steps()[-1])["fingerprint"]


@pytest.mark.slow
def test_a_run_that_ended_early_returns_its_result_and_can_train_on(tmp_path, capsys):
    # Any evaluation reaches a top-1 of 0.
    target = {"top1": 0.0}
    first = run(tmp_path / "early", target=target)
    assert (first["step"], first["ended_by"]) == (2, "target")
    assert first["to_target"] == {"steps": 2, "seconds": first["seconds"]}
    saved = json.loads((tmp_path / "early/result.json").read_text())
    assert saved["to_target"] == first["to_target"]
    capsys.readouterr()

    images = Images()
    assert run(tmp_path / "early", images, target=target) == first
    output = capsys.readouterr().out
    assert "step 2: stop.target is reached, since top1" in output
    assert "first step after" not in output

    resumed = run(tmp_path / "early")
    whole = run(tmp_path / "whole")
    assert (whole["step"], whole["ended_by"], whole["to_target"]) == (12, "total", None)
    assert without_times(resumed) == without_times(whole)
    assert final_arrays(tmp_path / "early") == final_arrays(tmp_path / "whole")


class Killed(Exception):
    """Stands for the end of a process at once: nothing is saved."""


@pytest.mark.slow
@pytest.mark.parametrize("precise_bn", [0, 2])
def test_a_run_without_a_new_best_ends_at_the_same_step_after_kills(
    precise_bn, tmp_path
):
    options = {"patience": 1, "precise_bn": precise_bn}
    whole = run(tmp_path / "whole", **options)
    assert whole["ended_by"] == "patience"
    last = whole["step"]
    assert 4 < last < 12

    def kill_in(evaluation: int) -> Images:
        def before(read: int) -> None:
            if read >= 32 * (evaluation - 1):
                raise Killed

        return Images(before)

    def kill_after_the_save(evaluation: dict) -> None:
        if evaluation["step"] == last:
            raise Killed

    # In the evaluation before the last one, in the last one, which has then become the
    # second one, and after the save.
    for evaluation in (last // 2 - 1, 2):
        with pytest.raises(Killed):
            run(tmp_path / "killed", kill_in(evaluation), **options)
    with pytest.raises(Killed):
        run(tmp_path / "killed", callback=kill_after_the_save, **options)
    result = run(tmp_path / "killed", **options)
    assert without_times(result) == without_times(whole)
    assert final_arrays(tmp_path / "killed") == final_arrays(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_run_that_ends_early_has_the_precise_statistics_of_a_shorter_run(
    is_stopped, tmp_path
):
    target = {"loss": 1e9}
    if is_stopped:
        # A signal comes in the second evaluation, which is that of the final
        # statistics.
        def send(read: int) -> None:
            if read == 32:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(PreemptedError):
            run(tmp_path / "early", Images(send), precise_bn=2, target=target)
    early = run(tmp_path / "early", precise_bn=2, target=target)
    short = run(tmp_path / "short", precise_bn=2, steps=2)
    assert (early["ended_by"], short["ended_by"]) == ("target", "total")
    names = ("step", "top1", "loss", "best")
    assert [early[name] for name in names] == [short[name] for name in names]
    assert final_arrays(tmp_path / "early") == final_arrays(tmp_path / "short")
    rows = metric_writers.read_metrics(tmp_path / "early")
    evaluated = [row["step"] for row in rows if "eval/top1" in row]
    # By running statistics, which reached the target, and by precise ones.
    assert evaluated == [2, 2]


@pytest.mark.slow
def test_a_longer_run_whose_target_is_reached_stays_at_its_end(tmp_path):
    first = run(tmp_path, target={"top1": 0.0})
    assert run(tmp_path, target={"top1": 0.0}, steps=20) == first
