"""The table of networks against the literature, and what it says to mistakes."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import ZOO, ResNet, create_model, get_spec, list_models
from resnet_jax.models.cost import count, count_macs, init_shapes
from resnet_jax.models.layers import pad_shortcut
from tests import keyed
from tests.models.names import deep_ones_slow

# Parameters, elements of running means and variances, and multiply-adds in millions of
# one forward pass at the image size of the paper. ImageNet: timm's own count. v1: the
# same but for the first 1x1 of stages 2, 3 and 4, which sees a quarter of the pixels:
# 3 x 77.07 M less. CIFAR: counted by hand from section 4.2 of the paper.
REFERENCE = {
    "resnet18": (11_689_512, 9_600, 1_814.1),
    "resnet34": (21_797_672, 17_024, 3_663.8),
    "resnet50": (25_557_032, 53_120, 4_089.2),
    "resnet101": (44_549_160, 105_344, 7_801.4),
    "resnet152": (60_192_808, 151_424, 11_513.6),
    "resnet200": (64_673_832, 176_000, 15_007.5),
    "resnet50_v1": (25_557_032, 53_120, 3_858.0),
    "resnet101_v1": (44_549_160, 105_344, 7_570.2),
    "resnet152_v1": (60_192_808, 151_424, 11_282.4),
    "resnet200_v1": (64_673_832, 176_000, 14_776.3),
    "cifar_resnet20": (269_722, 1_376, 40.55),
    "cifar_resnet32": (464_154, 2_272, 68.86),
    "cifar_resnet44": (658_586, 3_168, 97.17),
    "cifar_resnet56": (853_018, 4_064, 125.49),
    "cifar_resnet110": (1_727_962, 8_096, 252.89),
}
NAMES = deep_ones_slow(REFERENCE)
# What rounding of the reference, and the difference of two rounded figures, can make.
MACS_BOUND = {"imagenet": 0.1e6, "cifar": 0.005e6}


def test_the_zoo_lists_the_networks_of_the_reference():
    assert list_models() == list(REFERENCE)


@pytest.mark.parametrize("name", NAMES)
def test_counts_equal_the_reference(name):
    params, statistics, mega_macs = REFERENCE[name]
    model = create_model(name)
    size = 224 if model.spec.stem == "imagenet" else 32
    variables = init_shapes(model, size)
    assert ZOO[name].params == params
    assert count(variables["params"]) == params
    assert count(variables["batch_stats"]) == statistics
    macs = count_macs(model, size)
    assert abs(macs - mega_macs * 1e6) <= MACS_BOUND[model.spec.stem], macs


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_parameters_are_float32_though_the_computation_is_not(name):
    model = create_model(name, dtype="bfloat16", num_classes=7)
    variables = init_shapes(model, 32)
    images = jax.ShapeDtypeStruct((3, 40, 40, 3), jnp.float32)
    logits = jax.eval_shape(model.apply, variables, images)
    assert (logits.shape, logits.dtype) == ((3, 7), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_bfloat16_changes_logits_by_its_rounding_only():
    spec = get_spec("cifar_resnet20")
    variables, images = keyed.variables(spec), jnp.asarray(keyed.images(2, 32))
    exact = ResNet(spec).apply(variables, images)
    rounded = ResNet(spec, dtype="bfloat16").apply(variables, images)
    difference = np.abs(exact - rounded).max() / np.abs(exact).max()
    # Bfloat16 rounds at 2^-9 in each of 20 layers, so at about sqrt(20) x 2^-9 in all;
    # no difference would mean that it was not used.
    assert 1e-4 < difference < 0.05


def test_list_models_takes_patterns():
    assert list_models("cifar_*") == [name for name in REFERENCE if "cifar" in name]
    assert list_models("resnet?01*") == ["resnet101", "resnet101_v1"]
    assert list_models("vgg*") == []


@pytest.mark.parametrize("function", [get_spec, create_model])
def test_an_unknown_network_is_answered_with_the_nearest(function):
    with pytest.raises(UserError, match=r"'resnet5'.*resnet50"):
        function("resnet5")


@pytest.mark.parametrize("function", [get_spec, create_model])
def test_an_unknown_field_is_answered_with_the_nearest(function):
    with pytest.raises(UserError, match=r"'num_class'.*num_classes"):
        function("resnet50", num_class=10)


def test_a_value_that_is_not_allowed_is_answered_with_those_that_are(monkeypatch):
    # The tests' type checks would speak first; users run without them.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match=r"stride_at='5x5'.*3x3.*1x1"):
        get_spec("resnet50", stride_at="5x5")
    with pytest.raises(UserError, match="same length"):
        get_spec("resnet50", stage_sizes=(3, 4, 6))


@pytest.mark.parametrize(
    ("where", "channels"), [("end", [1, 1, 0, 0, 0, 0]), ("both", [0, 0, 1, 1, 0, 0])]
)
def test_option_a_keeps_every_second_pixel_and_pads_where_it_is_told(where, channels):
    pixels = jnp.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    padded = pad_shortcut(jnp.tile(pixels, 2), features=6, stride=2, where=where)
    kept = np.array([[1, 3], [7, 9]])
    np.testing.assert_array_equal(padded[0], kept[..., None] * np.array(channels))


def test_overrides_change_their_field_only():
    spec = get_spec("resnet50", num_classes=10)
    assert spec == dataclasses.replace(ZOO["resnet50"].spec, num_classes=10)
    assert ZOO["resnet50"].spec.num_classes == 1000


def test_images_of_the_wrong_channels_are_refused():
    grey = jax.ShapeDtypeStruct((2, 32, 32, 1), jnp.float32)
    model = create_model("cifar_resnet20")
    with pytest.raises(ValueError, match="takes 3 channels, the images have 1"):
        jax.eval_shape(model.apply, init_shapes(model, 32), grey)
