"""Features, dilation, other inputs and heads, tested against timm's networks."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from resnet_jax.models import ZOO, build, get_spec
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.naming import to_foreign
from tests.helpers import keyed
from tests.oracles import compare, networks

KINDS = [
    *("resnet18", "resnet26t", "test_resnet", "resnetblur18", "resnetaa34d"),
    *("resnetrs50", "resnetv2_18d", "resnetv2_50x1_bit", "skresnet18", "resnest14d"),
    *("res2net50_26w_4s", "nf_resnet50"),
]
DILATED = [(name, stride) for name in KINDS for stride in (8, 16)]
# These have a 3x3 shortcut, pooling before the convolution and TensorFlow's padding.
DILATED += [("senet154", 8), ("resnest50d_4s2x40d", 8), ("dm_nfnet_f0", 16)]


def assert_near(values, expected: torch.Tensor) -> None:
    """Compares an array [b, ...] or [b, h, w, c] with torch's [b, c, h, w]."""
    reference = expected.numpy()
    if reference.ndim == 4:
        reference = reference.transpose(0, 2, 3, 1)
    assert values.shape == reference.shape
    error = compare.relative_error(np.asarray(values), reference)
    assert error <= compare.LOGITS_BOUND, f"{error:.1e}"


@pytest.mark.parametrize("name", KINDS)
def test_features_equal_timm(name):
    spec = ZOO[name].spec
    images = keyed.images(1, 64)
    ours = build(spec).apply(keyed.variables(spec), jnp.asarray(images), features=True)
    with torch.no_grad():
        network = networks.build(name)
        theirs = network.forward_intermediates(
            networks.nchw(images), intermediates_only=True
        )
    assert list(ours) == ["C1", "C2", "C3", "C4", "C5"]
    for feature, expected in zip(ours.values(), theirs, strict=True):
        assert_near(feature, expected)


@pytest.mark.parametrize(("name", "output_stride"), DILATED)
def test_dilated_networks_equal_timm(name, output_stride):
    spec = get_spec(name, output_stride=output_stride)
    images = keyed.images(1, 64)
    ours = build(spec).apply(keyed.variables(spec), jnp.asarray(images))
    network = networks.build(name, output_stride=output_stride)
    assert_near(ours, torch.from_numpy(networks.logits(network, images)))


@pytest.mark.parametrize("name", ["resnet18", "resnetv2_18", "nf_resnet50"])
def test_networks_without_a_head_and_with_other_channels_equal_timm(name):
    spec = get_spec(name, num_classes=0, in_channels=4)
    network = networks.empty(name, num_classes=0, in_chans=4)
    scheme = SCHEMES[ZOO[name].scheme]
    networks.load(network, to_foreign(keyed.variables(spec), spec, scheme))
    images = keyed.images(1, 64, channels=4)
    ours = build(spec).apply(keyed.variables(spec), jnp.asarray(images))
    assert_near(ours, torch.from_numpy(networks.logits(network, images)))
