"""Fused 1x1 convolution + batch norm equals the two one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.kernels.conv import FusibleConvolution
from resnet_jax.kernels.geometry import Geometry
from resnet_jax.kernels.norm_options import GhostBatchNorm
from resnet_jax.kernels.plain import convolution
from resnet_jax.kernels.platforms import fused_over
from resnet_jax.kernels.tpu import norm
from resnet_jax.models import create_model
from resnet_jax.plan import hlo
from resnet_jax.training import programs
from tests.helpers import keyed, tiny

# For a batch of 12: images per ghost batch, and devices. The last ghost batch spans
# both devices.
SIZES = [(12, 1), (3, 1), (6, 2), (3, 2), (1, 4), (12, 2)]


def draw(name: str, *shape: int) -> jax.Array:
    """Draws standard normal values."""
    return jnp.asarray(keyed.generator(name).standard_normal(shape))


def arrays():
    """Draws images after a ReLU, a kernel, scale, bias, and an output's gradient."""
    x = jax.nn.relu(draw("x", 12, 5, 4, 6) + draw("shift", 6))
    kernel = draw("kernel", 1, 1, 6, 24)
    return x, kernel, 1 + 0.3 * draw("scale", 24), draw("bias", 24), draw("g", 12, 5, 4)


def from_output(x, kernel, scale, bias, settings):
    """Computes the definition: the statistics of the convolution's output."""
    y = convolution(x, kernel, Geometry())
    batches = y.reshape(-1, settings.size, *y.shape[1:])
    mean, var = (f(axis=(1, 2, 3), keepdims=True) for f in (batches.mean, batches.var))
    out = (batches - mean) / jnp.sqrt(var + settings.epsilon) * scale + bias
    return out.reshape(y.shape), mean[:, 0, 0, 0], var[:, 0, 0, 0]


@pytest.mark.parametrize(("size", "devices"), SIZES)
def test_output_statistics_and_gradients_equal_the_definition(size, devices):
    with jax.enable_x64(True):
        *args, g = arrays()
        settings = GhostBatchNorm(size, 1e-3, None, jnp.float64)
        mesh = tiny.mesh_of(devices)

        def from_input(x, kernel, scale, bias):
            fusible = FusibleConvolution(x, kernel)
            return norm.normalize(fusible, scale, bias, settings, mesh)

        got, pull = jax.vjp(jax.jit(from_input), *args)
        expected, pull_plain = jax.vjp(
            lambda *args: from_output(*args, settings), *args
        )
        zeros = jnp.zeros_like(got[1])
        cotangents = jnp.broadcast_to(g[..., None], got[0].shape), zeros, zeros
        pulled = pull(cotangents), pull_plain(cotangents)
        # Sums of at most 240 numbers below 100 in float64.
        assert tiny.difference(got, expected) < 1e-11
        assert tiny.difference(*pulled) < 1e-11


def test_a_scale_of_zero_has_a_gradient():
    x, kernel, _, bias, g = arrays()
    settings = GhostBatchNorm(4, 1e-5, None, jnp.float32)

    def loss(scale):
        fusible, mesh = FusibleConvolution(x, kernel), tiny.mesh_of(1)
        out, _, _ = norm.normalize(fusible, scale, bias, settings, mesh)
        return (out * g[..., None]).sum()

    def plain(scale):
        out, _, _ = from_output(x, kernel, scale, bias, settings)
        return (out * g[..., None]).sum()

    zero = jnp.zeros(24)
    got, expected = jax.grad(loss)(zero), jax.grad(plain)(zero)
    assert float(jnp.abs(expected).max()) > 1
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def network():
    """Returns a bottleneck network, variables unlike the initial ones, and images."""
    model = create_model(
        "resnet26", stage_sizes=(3,), widths=(8,), num_classes=5, bn_group_size=4
    )
    image = draw("image", 8, 32, 32, 3)
    return model, draw_variables(model, image), image


def draw_variables(model, image) -> dict:
    """Draws variables of a network, none of which has its initial value."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 * draw(jax.tree_util.keystr(path), *x.shape),
        jax.jit(model.init)(jax.random.key(0), image),
    )


def trained(model, variables, image):
    """Returns logits and running statistics in training, and the gradients."""

    def loss(params):
        logits, updated = model.apply(
            variables | {"params": params}, image, train=True, mutable=["batch_stats"]
        )
        return jnp.square(logits).mean(), (logits, updated)

    grads, results = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return *results, grads


@pytest.fixture(scope="module")
def exact(network):
    """Returns what training gives in float32 without fusion."""
    return trained(*network)


def check_same(got, expected) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    # float32 sums of 4 x 8 x 8 pixels in another order, through ten norms.
    for fused, plain in zip(got, expected, strict=True):
        assert tiny.difference(fused, plain) < 1e-4


@pytest.mark.slow
def test_a_fused_network_equals_one_without_fusion(network, exact):
    model, *others = network
    with fused_over(tiny.mesh_of(2)):
        got = trained(model, *others)
    check_same(got, exact)


@pytest.mark.long
def test_a_fused_network_with_scanned_blocks_equals_one_without_fusion(network):
    model, _, image = network
    model = model.clone(scan_blocks=True)
    variables = draw_variables(model, image)
    with fused_over(tiny.mesh_of(2)):
        got = trained(model, variables, image)
    check_same(got, trained(model, variables, image))


@pytest.mark.slow
def test_bfloat16_is_as_close_to_float32_as_without_fusion(network, exact):
    model, *others = network
    half = model.clone(dtype=jnp.bfloat16)

    def distance() -> float:
        """Returns the distance of all gradients, relative to their length."""
        flat = [
            jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])
            for grads in (trained(half, *others)[2], exact[2])
        ]
        return float(jnp.linalg.norm(flat[0] - flat[1]) / jnp.linalg.norm(flat[1]))

    # Roundings of the same kind in other places: 0.0142 of the length, and 0.0153.
    with fused_over(tiny.mesh_of(1)):
        fused = distance()
    assert fused < 1.3 * distance()


def test_evaluation_and_wide_inputs_are_not_fused(network):
    model, variables, image = network
    with fused_over(tiny.mesh_of(1)):
        fused = model.apply(variables, image)
    np.testing.assert_array_equal(fused, model.apply(variables, image))
    wide = FusibleConvolution(jnp.zeros((2, 3, 3, 512)), jnp.zeros((1, 1, 512, 8)))
    assert not norm.is_supported(wide, 2, tiny.mesh_of(1))
    assert wide.shape == wide.evaluate().shape


BOTTLENECKS = {
    "model.name": "resnet26",
    "model.overrides": {"stage_sizes": (1,), "widths": (8,), "stem": ((3, 1, 8),)},
    "model.bn_group_size": 2,
}


@pytest.mark.parametrize(
    ("images", "size", "devices", "supported"),
    [
        (16, 2, 8, True),
        (8, 2, 4, True),
        # One ghost batch of all images.
        (16, 16, 8, True),
        (16, 16, 2, True),
        # Ghost batches that span devices, and more than are worth a product each.
        (16, 4, 8, False),
        (16, 8, 4, False),
        (256, 2, 8, False),
        (12, 3, 8, False),
    ],
)
def test_devices_must_hold_a_few_whole_ghost_batches(images, size, devices, supported):
    fusible = FusibleConvolution(jnp.zeros((images, 1, 1, 8)), jnp.zeros((1, 1, 8, 32)))
    assert norm.is_supported(fusible, size, tiny.mesh_of(devices)) == supported


@pytest.mark.parametrize(
    ("chosen", "fused"), [("chip", False), (True, True), (False, False)]
)
def test_networks_on_cpus_are_fused_only_on_request(chosen, fused):
    experiment = tiny.setup(BOTTLENECKS | {"model.fused_norm": chosen})
    assert experiment.fused_mesh == (tiny.mesh_of(8) if fused else None)


def test_precise_statistics_are_computed_where_a_microbatch_is_a_ghost_batch():
    # Their step takes the whole batch, so that a device holds part of a ghost batch.
    changes = {"optim.microbatches": 2, "model.bn_group_size": 8}
    setup = tiny.setup(BOTTLENECKS | {"model.fused_norm": True} | changes)
    programs.compile_statistics_step(setup)


@pytest.mark.slow
def test_fusion_does_not_change_what_devices_exchange():
    def exchanged(fused):
        compiled = programs.compile_train_step(
            tiny.setup(BOTTLENECKS | {"model.fused_norm": fused})
        )
        collectives = hlo.collectives(compiled.as_text())
        kinds = {each.kind for each in collectives}
        return kinds, sum(each.elements for each in collectives)

    assert exchanged(True) == exchanged(False)


def test_an_unknown_value_of_the_config_key_is_an_error():
    with pytest.raises(UserError, match=r"model\.fused_norm='yes'"):
        tiny.setup({"model.fused_norm": "yes"})
