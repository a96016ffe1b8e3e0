"""Makes small networks of every naming scheme, with the values of `keyed`."""

import dataclasses

import jax
import numpy as np

from resnet_jax.models import get_spec
from resnet_jax.models.baselines import HighwaySpec, VGGSpec
from resnet_jax.models.zoo import Spec
from resnet_jax.weights.card import Card, default_card
from tests.helpers import keyed

# One network of each naming scheme. Some of their tensors are scalars.
NAMES = [
    *("test_resnet", "seresnet18", "resnetv2_50", "resnetv2_50x1_bit", "dm_nfnet_f0"),
    *("akamaster_resnet20", "highway19", "vgg19_bn", "keras_resnet50"),
    *("keras_resnet50v2", "tutorial_keras_resnet50"),
]


def spec_of(name: str, **fields) -> Spec:
    """Returns a network's spec with two stages of few channels.

    Args:
      name: The name of the network in the zoo.
      **fields: Fields of the spec to change.
    """
    spec = get_spec(name)
    if isinstance(spec, VGGSpec):
        small = {"stage_sizes": (1, 1), "widths": (4, 8), "hidden": 6, "pooled": 2}
    elif isinstance(spec, HighwaySpec):
        small = {"widths": ((4, 4), (8, 8))}
    else:
        # Norms with groups need at least 32 channels, and NFNets have groups of 128.
        width = {"group": 32, "evonorm_s0": 32, "none": 128}.get(spec.norm, 4)
        # A ResNeXt would have no channels in groups of less than 64 / base width.
        width = max(width, 64 // spec.base_width)
        stem = tuple((kernel, stride, width) for kernel, stride, _ in spec.stem)
        small = {"stage_sizes": (1, 2), "widths": (width, 2 * width), "stem": stem}
        small["block"] = spec.blocks[-1]
    # The tutorial's network has six classes, and its head is therefore named fc6.
    return dataclasses.replace(spec, **small | {"num_classes": 6} | fields)


def card_and_variables(name: str, **fields) -> tuple[Card, dict]:
    """Returns a card and variables like those that `load` returns."""
    spec = spec_of(name, **fields)
    return default_card(name, spec, origin="a test"), keyed.variables(spec)


def assert_equal(got, expected) -> None:
    """Asserts that two trees are equal, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for leaf, want in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.asarray(leaf).dtype == np.asarray(want).dtype
        assert np.asarray(leaf).tobytes() == np.asarray(want).tobytes()
