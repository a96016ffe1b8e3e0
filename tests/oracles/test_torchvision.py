"""Our networks against torchvision's."""

import numpy as np
import pytest

from resnet_jax.models import get_spec
from resnet_jax.weights.torchvision import from_torch, to_torch
from tests import keyed
from tests.oracles import compare, networks

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
# At odd sizes, wrong padding goes unnoticed: 'SAME' and torch's padding coincide.
SIZES = (224, 225)


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_torchvision(name):
    compare.assert_logits_equal(networks.build(name), get_spec(name), SIZES)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_running_statistics_equal_torchvision(name, size, in_float64):
    compare.assert_training_equal_in_float64(networks.build(name), get_spec(name), size)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_training_in_float32_is_near_torchvision(name):
    images = keyed.images(2, 224)
    gradients, statistics = compare.train_both(
        networks.build(name), get_spec(name), images
    )
    for tensor, (ours, theirs) in statistics.items():
        # Float32 rounds at 6e-8; 7e-7 was measured, at 65 pixels through 152 layers.
        error = compare.relative_error(ours, theirs)
        assert error <= 1e-5, f"{tensor}: {error:.1e}"
    for tensor, (ours, theirs) in gradients.items():
        # Rectifiers whose inputs round to the other side of zero: torch's own float32
        # is 0.015 away from its float64 (see the fixture `in_float64`).
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error <= 0.05, f"{tensor}: {error:.1e}"


@pytest.mark.parametrize("name", NAMES)
def test_weights_go_to_torchvision_and_back_unchanged(name):
    spec = get_spec(name)
    theirs = networks.arrays(networks.build(name))
    again = to_torch(from_torch(theirs, spec), spec)
    tracked = {key for key in theirs if key.endswith("num_batches_tracked")}
    assert again.keys() == theirs.keys() - tracked
    for key, value in again.items():
        np.testing.assert_array_equal(value, theirs[key], err_msg=key)
