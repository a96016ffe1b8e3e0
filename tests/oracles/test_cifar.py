"""Our CIFAR networks against trained weights, and against the paper's section 4.2."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from resnet_jax.models import create_model, get_spec
from resnet_jax.weights.torchvision import from_torch
from tests.oracles import compare, networks
from tests.real_data import real_data


@pytest.mark.parametrize(
    ("depth", "file"),
    [(20, "resnet20-12fca82f.th"), (32, "resnet32-d509ac18.th")],
)
def test_trained_weights_give_the_logits_of_their_authors(depth, file):
    weights = real_data("cifar-resnet-weights")
    pictures = sorted(real_data("cifar10-samples").glob("*.png"))
    images = np.stack([np.asarray(Image.open(picture)) for picture in pictures])
    images = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]

    saved = torch.load(weights / file, map_location="cpu", weights_only=True)
    tensors = {
        name.removeprefix("module."): value.numpy()
        for name, value in saved["state_dict"].items()
    }
    model = create_model(f"cifar_resnet{depth}", pad_channels="both")
    images = jnp.asarray(images, jnp.float32)
    logits = model.apply(from_torch(tensors, model.spec), images)

    reference = json.loads((weights / "reference_logits.json").read_text())
    expected = [
        reference[f"resnet{depth}"][picture.stem + ".png"] for picture in pictures
    ]
    # The reference is rounded to four decimals.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("pad", ["end", "both"])
@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_logits_equal_the_paper(depth, pad):
    reference = networks.fill(networks.CifarResNet(depth, pad))
    spec = get_spec(f"cifar_resnet{depth}", pad_channels=pad)
    compare.assert_logits_equal(reference, spec, (32, 33))


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("pad", ["end", "both"])
def test_gradients_and_running_statistics_equal_the_paper(pad, size, in_float64):
    reference = networks.fill(networks.CifarResNet(20, pad))
    spec = get_spec("cifar_resnet20", pad_channels=pad)
    compare.assert_training_equal_in_float64(reference, spec, size, batch=4)
