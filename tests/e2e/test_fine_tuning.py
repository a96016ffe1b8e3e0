"""A folder of photographs and any weights train with `configs/finetune.py` alone."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from huggingface_hub import constants
from ml_collections import ConfigDict
from PIL import Image

import resnet_jax
from resnet_jax.config import load, override
from resnet_jax.errors import UserError
from resnet_jax.models import get_spec
from resnet_jax.training.evaluation import evaluate_workdir
from resnet_jax.training.loop import train
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.naming import to_foreign
from resnet_jax.weights.save import save
from tests.helpers import keyed, small_networks, tiny
from tests.helpers.pictures import encode, write_folder
from tests.helpers.timm_config import CONFIG

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
COLOURS = {"barn owl": (200, 60, 60), "fox": (60, 200, 60), "gnu": (60, 60, 200)}
# Steps of a run that is as short as a run with a warm-up can be.
STEPS = 4


def photograph(kind: str, index: int, width: int = 320, height: int = 240) -> bytes:
    """Returns a JPEG of smooth noise around the colour of a kind."""
    rng = np.random.default_rng([index, *kind.encode()])
    noise = rng.normal(0, 40, (6, 8, 3)) + COLOURS[kind]
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    return encode(image.resize((width, height), Image.Resampling.BICUBIC), "JPEG")


@pytest.fixture
def photos(tmp_path) -> str:
    """Returns the source of 18 photographs of three classes, with two splits."""
    files = {
        f"{split}/{kind}/{index}.jpg": photograph(kind, index)
        for split, indices in (("train", range(4)), ("val", range(4, 6)))
        for kind in COLOURS
        for index in indices
    }
    return write_folder(tmp_path / "my photos", files)


def timm_weights(folder: pathlib.Path, monkeypatch) -> str:
    """Writes a cache of the hub with random weights of a small network of timm."""
    repository = folder / "hub" / "models--timm--test_resnet.r160_in1k"
    snapshot = repository / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    spec = get_spec("test_resnet")
    tensors = to_foreign(keyed.variables(spec), spec, SCHEMES["timm"])
    tensors = {name: np.array(x, order="C") for name, x in tensors.items()}
    safetensors.numpy.save_file(tensors, snapshot / "model.safetensors")
    cfg = CONFIG["pretrained_cfg"] | HALF | {"input_size": [3, 64, 64]}
    config = CONFIG | {"architecture": "test_resnet", "pretrained_cfg": cfg}
    (snapshot / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    return "timm:test_resnet.r160_in1k"


def keras_weights(folder: pathlib.Path, monkeypatch) -> str:
    """Writes weights for BGR input as Keras does, with their card."""
    card, variables = small_networks.card_and_variables("keras_resnet50")
    card = dataclasses.replace(card, image_size=64)
    save(str(folder / "mine.weights.h5"), variables, card)
    return str(folder / "mine.weights.h5")


def grey_weights(folder: pathlib.Path, monkeypatch) -> str:
    """Writes weights of a network with one input channel."""
    card, variables = small_networks.card_and_variables("test_resnet", in_channels=1)
    save(str(folder / "grey"), variables, dataclasses.replace(card, image_size=64))
    return str(folder / "grey")


def headless_weights(folder: pathlib.Path, monkeypatch) -> str:
    """Writes weights of a network without a head."""
    card, variables = small_networks.card_and_variables("test_resnet", num_classes=0)
    save(str(folder / "body"), variables, dataclasses.replace(card, image_size=64))
    return str(folder / "body")


def workdir_of_a_run(folder: pathlib.Path, monkeypatch) -> str:
    """Trains a small network on images of 16 px, and returns the workdir."""
    config = tiny.config({"total": {"steps": 1}, "data.image_size": 16})
    train(config, folder / "before")
    return str(folder / "before")


KINDS = {
    timm_weights: {"image_size": 64, "interpolation": "bicubic", **HALF},
    keras_weights: {"image_size": 64, "std": (1 / 255,) * 3},
    grey_weights: {"image_size": 64, "channels": 1},
    headless_weights: {"image_size": 64, "channels": 3},
    workdir_of_a_run: {"image_size": 16, "channels": 1},
}


def finetune(photos: str, init_from: str, *overrides: str) -> ConfigDict:
    config = load("configs/finetune.py")
    flags = (f"data.source={photos}", f"init_from={init_from}", *overrides)
    override(config, [f"--config.{flag}" for flag in flags])
    return config


@pytest.mark.slow
@pytest.mark.parametrize("weights", KINDS, ids=lambda kind: kind.__name__)
def test_photographs_train_from_any_weights_and_are_predicted_as_evaluated(
    weights, photos, tmp_path, monkeypatch, caplog
):
    init_from = weights(tmp_path, monkeypatch)
    config = finetune(photos, init_from, f"total.steps={STEPS}")
    result = train(config, tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    for key, value in KINDS[weights].items():
        assert recorded["data"][key] == (
            list(value) if isinstance(value, tuple) else value
        )
    model = resnet_jax.load(tmp_path / "run")
    assert model.card.classes == tuple(COLOURS)
    folder = pathlib.Path(photos.partition(":")[2])
    paths = sorted((folder / "val").glob("*/*"))
    names = [first.name for (first,) in model.predict(paths, k=1)]
    right = sum(map(str.__eq__, names, [path.parent.name for path in paths]))
    assert result["best"]["top1"] == right / len(paths)
    # The evaluation of the workdir has the recorded values, and no weights to read. The
    # same config may be named, since what it leaves empty does not count.
    if weights is grey_weights:
        shutil.rmtree(init_from)
        again = evaluate_workdir(tmp_path / "run", "best", named_config=config)
        assert again["top1"] == result["best"]["top1"]
        assert "differs" not in caplog.text


@pytest.mark.slow
def test_a_linear_probe_changes_nothing_but_the_head(photos, tmp_path, monkeypatch):
    init_from = grey_weights(tmp_path, monkeypatch)
    config = load("configs/linear_probe.py")
    flags = (f"data.source={photos}", f"init_from={init_from}", f"total.steps={STEPS}")
    override(config, [f"--config.{flag}" for flag in flags])
    train(config, tmp_path / "run")
    before, after = (
        flatten_dict(resnet_jax.load(path).variables)
        for path in (init_from, tmp_path / "run")
    )
    assert before.keys() == after.keys()
    same = {key for key in before if np.array_equal(before[key], after[key])}
    assert {key[1] for key in before.keys() - same} == {"head"}


@pytest.mark.slow
def test_a_run_resumes_when_its_weights_are_gone(photos, tmp_path, monkeypatch):
    init_from = grey_weights(tmp_path, monkeypatch)

    def stop_at_step_2(evaluation: dict):
        if evaluation["step"] == 2:
            raise InterruptedError

    flags = (f"total.steps={STEPS}", "optim.warmup.percent=25")
    config = finetune(photos, init_from, *flags)
    with pytest.raises(InterruptedError):
        train(config, tmp_path / "run", callback=stop_at_step_2)
    whole = train(config, tmp_path / "whole")
    shutil.rmtree(init_from)
    resumed = train(config, tmp_path / "run")
    assert resumed["loss"] == whole["loss"]
    # A value that the user gives is compared as ever.
    with pytest.raises(UserError, match=r"another config.*image_size: 64 -> 32"):
        other = finetune(photos, init_from, *flags, "data.image_size=32")
        train(other, tmp_path / "run")
    # Without the workdir nothing tells what the network was.
    with pytest.raises(UserError, match="grey"):
        train(config, tmp_path / "new")


def test_weights_of_another_network_than_the_named_one_are_refused(
    photos, tmp_path, monkeypatch
):
    init_from = grey_weights(tmp_path, monkeypatch)
    config = finetune(photos, init_from, "model.name=resnet50", "total.steps=2")
    with pytest.raises(UserError, match=r"grey does not fit resnet50"):
        train(config, tmp_path / "run")


def test_a_tag_that_does_not_exist_is_refused(photos, tmp_path, monkeypatch):
    timm_weights(tmp_path, monkeypatch)
    config = finetune(photos, "timm:test_resnet.none")
    with pytest.raises(UserError, match=r"timm/test_resnet\.none cannot be reached"):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_a_few_photographs_without_splits_train_in_batches_that_are_larger(tmp_path):
    files = {
        f"{kind}/{index}.jpg": photograph(kind, index)
        for kind in COLOURS
        for index in range(5)
    }
    source = write_folder(tmp_path / "few", files)
    small = f"model.overrides={tiny.NETWORK}"
    flags = ("model.name=cifar_resnet20", small, "total.steps=40")
    result = train(finetune(source, "", *flags), tmp_path / "run")
    # One picture of each class is held out, and 12 are trained on in batches of 32. The
    # colours of the classes differ more than those of their pictures.
    assert (result["n_seen"], result["best"]["top1"]) == (3, 1)
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    evaluations = [x for x in map(json.loads, rows) if "eval/top1" in x]
    assert len(evaluations) == 20
