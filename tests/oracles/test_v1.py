"""Our v1 networks against torchvision's with the strides moved to the first 1x1."""

import pytest

from resnet_jax.models import get_spec, list_models
from tests.oracles import compare, networks


@pytest.mark.parametrize("name", list_models("*_v1"))
def test_logits_of_v1_equal_the_reference(name):
    compare.assert_logits_equal(networks.build(name), get_spec(name), (64, 65))


@pytest.mark.parametrize("size", [64, 65])
def test_gradients_and_running_statistics_of_v1_equal_the_reference(size, in_float64):
    name = "resnet50_v1"
    compare.assert_training_equal_in_float64(networks.build(name), get_spec(name), size)
