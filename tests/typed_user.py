"""The program of a user, which `tests/test_library.py` checks with strict mypy."""

import pathlib
from typing import Any, assert_type

import jax
import numpy as np
from flax import linen as nn
from PIL import Image

import resnet_jax
from resnet_jax.config import RECIPES, load
from resnet_jax.data import Source
from resnet_jax.errors import UserError
from resnet_jax.weights import Card, Prediction, TrainedModel

Pixels = np.ndarray[tuple[Any, ...], np.dtype[Any]]


def describe(path: str) -> str:
    try:
        model = resnet_jax.load(path, num_classes=10)
    except UserError as error:
        return str(error)
    assert_type(model, TrainedModel)
    return repr(model)


def use(model: TrainedModel, source: Source) -> None:
    image = Image.new("L", (8, 8))
    predictions = model.predict([pathlib.Path("a.png"), "b.png", b"", image], k=1)
    assert_type(predictions, list[list[Prediction]])
    assert_type(predictions[0][0].name, str)
    assert_type(predictions[0][0].probability, float)
    assert_type(model.logits(np.zeros((8, 8), np.uint8)), Pixels)
    assert_type(model.features([pathlib.Path("a.png")]), Pixels)
    assert_type(model.card, Card)
    assert_type(model.card.preprocess("a.png"), jax.Array)
    assert_type(model.module, nn.Module)
    module, variables, card = model
    module.apply(variables, card.preprocess("a.png"))
    assert_type(len(source), int)
    model.predict(3)  # type: ignore[arg-type]
    model.predict("a.png", k="one")  # type: ignore[arg-type]
    resnet_jax.load(3)  # type: ignore[arg-type]


def train(workdir: pathlib.Path) -> float:
    config = load(RECIPES / "quickstart.py")
    config.total = {"epochs": 3}
    result = resnet_jax.train(config, workdir)
    images, labels = np.zeros((64, 8, 8), np.uint8), np.zeros(64, np.int32)
    resnet_jax.train(config, "runs/mine", data=(images, labels), callback=print)
    resnet_jax.train(config, workdir, data="mine")  # type: ignore[arg-type]
    return float(result["top1"])


assert_type(resnet_jax.list_models("cifar*"), list[str])
assert_type(resnet_jax.create_model("resnet50", dtype="bfloat16"), nn.Module)
assert_type(resnet_jax.__version__, str)
resnet_jax.create_model(50)  # type: ignore[arg-type]
