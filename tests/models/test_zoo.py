"""The table of networks, tested against the literature, and its error messages."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from resnet_jax.errors import BadValueError, UserError
from resnet_jax.models import ZOO, build, create_model, get_spec, list_models
from resnet_jax.models.cost import cost_of_jaxpr, count, init_shapes
from resnet_jax.models.layers import pad_shortcut
from tests.helpers import keyed
from tests.helpers.network_names import deep_ones_slow

GOLDEN = Path(__file__).parents[1] / "golden"
COUNTS = {
    name: figures
    for name, *figures in (
        line.split()
        for line in (GOLDEN / "counts.txt").read_text().splitlines()
        if not line.startswith("#")
    )
}
# One small network of each kind.
KINDS = [
    *("test_resnet", "resnet50_gn", "seresnet18", "ecaresnet26t", "resnetblur18"),
    *("resnetaa34d", "resnetrs50", "resnetv2_18", "resnetv2_50d_evos", "skresnet18"),
    *("resnetv2_50d_frn", "resnetv2_50x1_bit", "resnest14d", "res2net50_26w_4s"),
    *("nf_resnet50", "nfnet_f0", "keras_resnet50", "keras_resnet50v2"),
    *("cifar_resnet20", "preact110", "wrn16_4", "plain20", "vgg19_bn", "highway19"),
    "tutorial_keras_resnet50",
]


@pytest.mark.parametrize("name", deep_ones_slow(ZOO))
def test_counts_equal_the_table_and_the_reference(name):
    entry = ZOO[name]
    params, statistics, mega_macs = COUNTS.get(name, (entry.params, "-", "-"))
    # Scanned blocks are traced much faster, and one trace serves all counts.
    model = build(entry.spec, scan_blocks=True)
    image = jnp.zeros((1, entry.image_size, entry.image_size, entry.spec.in_channels))
    trace = jax.make_jaxpr(model.init_with_output, return_shape=True)
    jaxpr, (_, variables) = trace(jax.random.key(0), image)
    assert count(variables["params"]) == entry.params == int(params)
    if statistics != "-":
        assert count(variables.get("batch_stats", {})) == int(statistics)
    if mega_macs != "-":
        macs = cost_of_jaxpr(jaxpr.jaxpr).macs
        # The reference figures have four digits, and some omit attention and blurring.
        assert abs(macs / 1e6 / float(mega_macs) - 1) < 2e-3, macs


def test_every_network_of_the_reference_counts_is_in_the_zoo():
    assert COUNTS.keys() <= ZOO.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_logits_and_parameters_are_float32_in_a_bfloat16_computation(name):
    model = create_model(name, dtype="bfloat16", num_classes=7)
    variables = init_shapes(model, 64)
    images = jax.ShapeDtypeStruct((3, 64, 64, 3), jnp.float32)
    logits = jax.eval_shape(model.apply, variables, images)
    assert (logits.shape, logits.dtype) == ((3, 7), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_bfloat16_changes_logits_by_rounding_only():
    spec = get_spec("cifar_resnet20")
    variables, images = keyed.variables(spec), jnp.asarray(keyed.images(2, 32))
    exact = build(spec).apply(variables, images)
    rounded = build(spec, dtype="bfloat16").apply(variables, images)
    difference = np.abs(exact - rounded).max() / np.abs(exact).max()
    # bfloat16 rounds at 2^-9 in each of 20 layers, which makes about sqrt(20) x 2^-9 in
    # all. No difference would mean that it was not used.
    assert 1e-4 < difference < 0.05


def test_list_models_takes_patterns():
    depths = (20, 32, 44, 56, 110, 1202)
    assert list_models("cifar_*") == [f"cifar_resnet{depth}" for depth in depths]
    assert list_models("resnet?01_v1") == ["resnet101_v1"]
    assert list_models("alexnet*") == []


@pytest.mark.parametrize("function", [get_spec, create_model])
def test_the_error_for_an_unknown_network_names_the_nearest_one(function):
    with pytest.raises(UserError, match=r"'resnet5'.*resnet50"):
        function("resnet5")


def test_a_deprecated_name_of_timm_gives_the_new_network_and_a_warning(caplog):
    assert get_spec("gluon_resnet50_v1d") == ZOO["resnet50d"].spec
    assert "gluon_resnet50_v1d is a deprecated name of resnet50d" in caplog.text


def test_a_tag_of_weights_after_the_name_is_ignored(caplog):
    assert get_spec("resnet50.a1_in1k") == ZOO["resnet50"].spec
    assert not caplog.text


@pytest.mark.parametrize("function", [get_spec, create_model])
def test_the_error_for_an_unknown_field_names_the_nearest_one(function):
    with pytest.raises(UserError, match=r"'num_class'.*num_classes"):
        function("resnet50", num_class=10)


def test_the_error_for_an_invalid_value_names_the_valid_ones(monkeypatch):
    # The type checks of the tests, which users do not run, would raise earlier.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(UserError, match=r"stride_at='5x5'.*3x3.*1x1"):
        get_spec("resnet50", stride_at="5x5")
    with pytest.raises(UserError, match="same length"):
        get_spec("resnet50", stage_sizes=(3, 4, 6))


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("preact110", "attention", "se"),
        ("preact110", "anti_alias", "blur"),
        ("resnet18", "spatial", "hierarchical"),
        ("resnet50", "skip_gain", True),
        ("resnet50", "block_dropout", 0.3),
    ],
)
def test_a_field_that_the_blocks_do_not_support_is_rejected(name, field, value):
    with pytest.raises(UserError, match=f"{field}=.* supported by the block"):
        get_spec(name, **{field: value})


@pytest.mark.parametrize(
    ("place", "channels"), [("end", [1, 1, 0, 0, 0, 0]), ("both", [0, 0, 1, 1, 0, 0])]
)
def test_option_a_keeps_every_second_pixel_and_pads_the_channels(place, channels):
    pixels = jnp.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    padded = pad_shortcut(jnp.tile(pixels, 2), features=6, stride=2, position=place)
    kept = np.array([[1, 3], [7, 9]])
    np.testing.assert_array_equal(padded[0], kept[..., None] * np.array(channels))


def test_overrides_change_their_field_only():
    spec = get_spec("resnet50", num_classes=10)
    assert spec == dataclasses.replace(ZOO["resnet50"].spec, num_classes=10)
    assert ZOO["resnet50"].spec.num_classes == 1000


def test_images_with_another_number_of_channels_are_rejected():
    grey = jax.ShapeDtypeStruct((2, 32, 32, 1), jnp.float32)
    model = create_model("cifar_resnet20")
    with pytest.raises(
        ValueError, match="takes images of 3 channels, and these have 1"
    ):
        jax.eval_shape(model.apply, init_shapes(model, 32), grey)


def test_create_model_points_to_load_for_trained_weights():
    with pytest.raises(UserError, match=r"resnet_jax\.load\('timm:NAME\.TAG'\)"):
        create_model("resnet18", pretrained=True)


WRONG = (
    *(("groups", 0), ("groups", -1), ("widths", (0, 0, 0, 0)), ("stem", ())),
    *(("stage_sizes", (3, 4, 6, -3)), ("num_classes", -1), ("in_channels", 2**40)),
    *(("alpha", float("nan")), ("alpha", float("inf")), ("dropout", -0.1)),
    *(("norm_epsilon", -1.0), ("head_init_std", -1.0), ("se_ratio", 0.0)),
    *(("drop_path", 2.0), ("norm_momentum", 7.0), ("pruned_features", (1,))),
)


@pytest.mark.parametrize(("field", "value"), WRONG)
def test_a_spec_with_an_illegal_number_is_an_error_that_names_the_field(field, value):
    with pytest.raises(BadValueError, match=field):
        get_spec("resnet50", **{field: value})


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(("vgg19", "widths", (64, 128)), ("vgg19", "hidden", 0)),
        *(("vgg19", "dropout", 1.5), ("highway19", "widths", ((8,), ()))),
        ("highway19", "gate_bias", float("nan")),
    ],
)
def test_baselines_check_their_fields_too(name, field, value):
    with pytest.raises(BadValueError, match=field):
        get_spec(name, **{field: value})


def test_a_field_of_another_type_is_an_error_that_names_it():
    # The tests themselves run with a check of types.
    code = """
from resnet_jax.errors import BadValueError
from resnet_jax.models import get_spec
for field in ("block", "stage_sizes", "groups", "alpha", "skip_gain", "stem", "biased"):
    for value in (-2.5, True, None, "x", ("x",), {"a": 1}):
        try:
            spec = get_spec("resnet50", **{field: value})
        except BadValueError as error:
            assert f"resnet50: {field}" in str(error), error
        else:
            assert getattr(spec, field) in (-2.5, True), (field, value)
            assert field in ("alpha", "skip_gain"), (field, value)
for name in (None, 5, b"resnet50", ("resnet50",)):
    try:
        get_spec(name)
    except BadValueError as error:
        assert "name of a network is a string" in str(error), error
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("function", [get_spec, create_model])
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # The name of the function's own argument is no field either.
        ({"name": "resnet50"}, "no field 'name'"),
        ({"pruned_widths": (((1, 1),),)}, r"entries for \(1,\) blocks"),
        ({"stage_sizes": (2**31 - 1, 1, 1)}, "more than 10,000 blocks"),
    ],
)
def test_a_spec_of_an_impossible_network_is_an_error(function, overrides, message):
    with pytest.raises(UserError, match=message):
        function("cifar_resnet20", **overrides)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block": "basic", "groups": 3}, "16 to 16 channels in 3 groups"),
        ({"base_width": 1}, "16 to 0 channels"),
        ({"reduce_first": 300}, "16 to 0 channels"),
        ({"group_width": 500}, "in 0 groups"),
        ({"spatial": "split_attention", "radix": 3}, "16 to 48 channels in 3 groups"),
        ({"head_pool": 100}, "head_pool=100 does not fit"),
    ],
)
def test_channels_and_sizes_that_do_not_fit_are_errors(fields, message):
    module = create_model("cifar_resnet20", **{"block": "bottleneck"} | fields)
    with pytest.raises(BadValueError, match=message):
        init_shapes(module, 16)
