"""Runs on folders without splits: what they record, evaluate and refuse to resume."""

import pathlib
import re
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from resnet_jax.data.sources import open_source
from resnet_jax.errors import UserError
from resnet_jax.training.evaluation import evaluate_workdir
from resnet_jax.training.loop import train
from tests.helpers import runs, tiny


def config_for(source: str, changes=None) -> ConfigDict:
    """Returns a config of four steps, with another seed than the default."""
    run = {
        "seed": 7,
        "data.source": source,
        "data.eval_split": "",
        "data.eval_fraction": 0.3,
        "batch_size": 8,
        "model.bn_group_size": 8,
        "checkpoint.every": ConfigDict({"steps": 2}),
        "evaluate.every": ConfigDict({"steps": 4}),
    }
    return tiny.config(run | (changes or {}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A directory with a folder of `photos` and the workdir of a `run` on it."""
    root = tmp_path_factory.mktemp("held_out")
    rng = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (root / "photos" / name).mkdir(parents=True)
        for index in range(10):
            pixels = rng.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(root / f"photos/{name}/{index}.png")
    train(config_for(f"folder:{root / 'photos'}"), root / "run")
    return root


def test_the_workdir_has_the_split_as_a_source(finished):
    assert runs.read_json(finished / "run/config.json")["data"]["eval_split"] == (
        "held_out"
    )
    table = f"csv:{finished}/run/split.csv"
    assert len(open_source(table, "train")) == 14
    assert (
        len(open_source(table, "val")) == runs.result(finished / "run")["n_seen"] == 6
    )


def test_a_run_on_the_recorded_split_is_the_same_run(finished, tmp_path):
    changes = {"data.eval_split": "val"}
    train(config_for(f"csv:{finished}/run/split.csv", changes), tmp_path / "run")
    runs.assert_same_end(tmp_path / "run", finished / "run")


def test_an_evaluation_is_of_the_images_that_were_held_out(finished):
    evaluated = evaluate_workdir(finished / "run", "last")
    result = runs.result(finished / "run")
    assert evaluated["split"] == f"{finished}/photos (held out)"
    assert not evaluated["changed"]
    for key in ("n_seen", "top1", "loss"):
        assert evaluated[key] == result[key]


def test_an_evaluation_of_images_that_were_trained_on_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    folder, workdir = tmp_path / "photos", tmp_path / "run"
    shutil.rmtree(workdir)
    train(config_for(f"folder:{folder}", {"total": ConfigDict({"steps": 2})}), workdir)
    shutil.copy(folder / "ant/0.png", folder / "ant/10.png")
    with pytest.raises(UserError, match="not those of the run") as raised:
        evaluate_workdir(workdir, "last")
    # The flags of the message evaluate the images of the run.
    flags = re.findall(r"--config\S+", str(raised.value))
    evaluated = evaluate_workdir(workdir, "last", flags)
    assert evaluated["loss"] == runs.result(workdir)["loss"]
    (folder / "ant/10.png").unlink()
    with pytest.raises(UserError, match="the seed"):
        evaluate_workdir(workdir, "last", ["--config.seed=8"])


def test_a_run_resumes_with_the_same_images_only(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    longer = {"total": ConfigDict({"steps": 6}), "optim.schedule": "constant"}
    started = {"optim.schedule": "constant"}
    source = f"folder:{tmp_path / 'photos'}"
    train(config_for(source, started), tmp_path / "again")
    # The folder has moved meanwhile.
    (tmp_path / "photos").rename(tmp_path / "moved")
    source = f"folder:{tmp_path / 'moved'}"
    assert train(config_for(source, longer), tmp_path / "again")["step"] == 6
    shutil.copy(tmp_path / "moved/ant/0.png", tmp_path / "moved/ant/10.png")
    with pytest.raises(UserError, match="other data: the training split had 14 images"):
        train(config_for(source, longer), tmp_path / "again")
    # An eval split that is added would return the images to the training split.
    (tmp_path / "moved/ant/10.png").unlink()
    for name in ("ant", "bee"):
        for split in ("train", "val"):
            folder = tmp_path / "moved" / split / name
            shutil.copytree(tmp_path / "moved" / name, folder)
    with pytest.raises(UserError, match="other data"):
        train(config_for(source, longer), tmp_path / "again")


def test_a_balanced_run_resumes_as_if_it_had_not_stopped(finished, tmp_path):
    source = f"folder:{finished / 'photos'}"
    changes = {"data.balance": True, "optim.schedule": "constant"}
    longer = changes | {"total": ConfigDict({"steps": 6})}
    train(config_for(source, longer), tmp_path / "whole")
    train(config_for(source, changes), tmp_path / "stopped")
    train(config_for(source, longer), tmp_path / "stopped")
    runs.assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    with pytest.raises(UserError, match=r"another config \(data\.balance: True -> F"):
        train(config_for(source, longer | {"data.balance": False}), tmp_path / "whole")


def test_a_run_with_one_class_warns_that_nothing_is_learnt(finished, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(finished / "photos/ant", folder / "ant")
    config = config_for(f"folder:{folder}", {"total": ConfigDict({"steps": 1})})
    train(config, tmp_path / "run")
    warning = f"warning: {folder} (not held out) has only the class 'ant', so every"
    assert warning in capsys.readouterr().out
