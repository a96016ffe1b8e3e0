"""Features, dropout, drop path and gradients of the networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from resnet_jax.models import ZOO, build, create_model, get_spec
from resnet_jax.models.baselines import average_to
from resnet_jax.models.spec import plan_blocks
from tests.helpers import keyed, tiny
from tests.helpers.network_names import one_of_each_kind


def output_shapes(name: str, size: int, **arguments) -> dict:
    """Returns the shapes of a network's outputs for one image of a size."""
    spec = ZOO[name].spec
    image = jax.ShapeDtypeStruct((1, size, size, spec.in_channels), jnp.float32)
    model = build(spec, scan_blocks=True)
    out, _ = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, **arguments), image
    )
    return jax.tree.map(jnp.shape, out)


@pytest.mark.parametrize("name", one_of_each_kind(ZOO))
def test_features_are_the_stages_by_name(name):
    entry = ZOO[name]
    size = entry.image_size
    features = output_shapes(name, size, features=True)
    stages = len(features)
    assert list(features) == [f"C{i}" for i in range(1, stages + 1)]
    sides = [shape[1] for shape in features.values()]
    assert sides == sorted(sides, reverse=True)
    # In networks for large images C1 has half of the image's side and C5 1/32 of it;
    # VGG's C5, before the last pooling, has 1/16.
    if not entry.spec.for_small_images and "vgg" not in name:
        assert sides[0] == size // 2
        assert sides[-1] == size // 32


@pytest.mark.slow
@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_output_stride_is_the_ratio_of_the_image_to_the_last_feature_map(stride):
    model = create_model("resnet50", output_stride=stride, num_classes=0)
    image = jnp.zeros((1, 64, 64, 3))
    variables = model.init(jax.random.key(0), image)
    features = model.apply(variables, image, features=True)
    assert features["C5"].shape == (1, 64 // stride, 64 // stride, 2048)
    assert model.apply(variables, image).shape == (1, 2048)


def test_drop_path_rates_rise_by_block_depth_or_stage():
    def rates(rule: str) -> list[float]:
        spec = get_spec("cifar_resnet20", drop_path=0.6, drop_path_by=rule)
        return [plan.drop_path for stage in plan_blocks(spec) for plan in stage]

    np.testing.assert_allclose(rates("block"), np.linspace(0, 0.6, 9))
    np.testing.assert_allclose(rates("depth"), np.arange(1, 10) / 9 * 0.6)
    np.testing.assert_allclose(rates("stage"), np.repeat([2, 3, 4], 3) / 4 * 0.6)


@pytest.mark.slow
def test_dropout_changes_training_only_and_depends_on_the_random_key():
    spec = get_spec("wrn16_4", block_dropout=0.3, dropout=0.2, drop_path=0.5)
    model, variables = build(spec), keyed.variables(spec)
    images = jnp.asarray(keyed.images(4, 16))

    def logits(seed: int, train: bool):
        out, _ = model.apply(
            variables,
            images,
            train=train,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(seed)},
        )
        return out

    np.testing.assert_array_equal(logits(0, False), logits(1, False))
    np.testing.assert_array_equal(logits(0, True), logits(0, True))
    assert np.abs(logits(0, True) - logits(1, True)).max() > 0.01


def test_average_to_equals_adaptive_average_pooling_of_torch():
    # torch's AdaptiveAvgPool2d averages 0..9 to 7 outputs over [0, 1], [1, 2],
    # [2, 3, 4], [4, 5], [5, 6, 7], [7, 8] and [8, 9].
    x = jnp.arange(10.0)[None, :, None, None]
    rows = average_to(jnp.broadcast_to(x, (1, 10, 10, 1)), 7)[0, :, 0, 0]
    np.testing.assert_allclose(rows, [0.5, 1.5, 3, 4.5, 6, 7.5, 8.5])
    assert average_to(x[:, :1], 7).shape == (1, 7, 7, 1)


def test_images_whose_sides_the_strides_do_not_divide_are_rejected():
    model = create_model("resnetaa50")
    with pytest.raises(ValueError, match="images whose sides are multiples of"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 72, 72, 3)))


def test_the_head_starts_with_the_bias_of_its_spec():
    model = create_model("cifar_resnet20", head_bias=-2.5)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    np.testing.assert_array_equal(
        variables["params"]["head"]["bias"], np.full(10, -2.5)
    )


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet50", "resnext50_32x4d"])
def test_gradients_inside_shard_map_equal_those_of_the_whole_batch(name):
    # The parameters are replicated on all devices, and the batch is sharded.
    widths = ZOO[name].spec.widths[:2]
    spec = get_spec(name, stage_sizes=(1, 1), widths=widths)
    variables = keyed.variables(spec)
    model = build(spec, bn_group_size=2)
    images = jnp.asarray(keyed.images(4, 33))

    def loss(params, images):
        changed = variables | {"params": params}
        out, _ = model.apply(changed, images, train=True, mutable=["batch_stats"])
        return jnp.square(out).sum()

    def gradients_of_shard(params, images):
        return jax.grad(lambda p: jax.lax.psum(loss(p, images), "data"))(params)

    mapped = jax.shard_map(
        gradients_of_shard,
        mesh=tiny.mesh_of(2),
        in_specs=(P(), P("data")),
        out_specs=P(),
    )
    whole = jax.jit(jax.grad(loss))(variables["params"], images)
    # The sums are taken in two orders in float32, through norms of two images.
    difference = tiny.difference(jax.jit(mapped)(variables["params"], images), whole)
    assert difference < 1e-3
