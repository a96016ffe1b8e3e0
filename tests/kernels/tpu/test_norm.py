"""Batch norm from the input of a convolution: equal to that from its output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.kernels.cpu.conv import Geometry, convolution
from resnet_jax.kernels.tpu import norm
from resnet_jax.kernels.tpu.norm import Product
from resnet_jax.models import create_model
from resnet_jax.models.norms import Normalization
from resnet_jax.plan import hlo
from resnet_jax.training import programs
from tests.helpers import keyed, tiny

# A batch of 12: images of a group, and devices; in the last one group is on both.
GROUPS = [(12, 1), (3, 1), (6, 2), (3, 2), (1, 4), (12, 2)]


def draw(name: str, *shape: int) -> jax.Array:
    """Draws standard normal values."""
    return jnp.asarray(keyed.generator(name).standard_normal(shape))


def arrays():
    """Images after a ReLU, a kernel, scale, bias, and a gradient by the output."""
    x = jax.nn.relu(draw("x", 12, 5, 4, 6) + draw("shift", 6))
    kernel = draw("kernel", 1, 1, 6, 24)
    return x, kernel, 1 + 0.3 * draw("scale", 24), draw("bias", 24), draw("g", 12, 5, 4)


def from_output(x, kernel, scale, bias, of):
    """The definition: statistics of what the convolution gives."""
    y = convolution(x, kernel, Geometry())
    groups = y.reshape(-1, of.size, *y.shape[1:])
    mean, var = (f(axis=(1, 2, 3), keepdims=True) for f in (groups.mean, groups.var))
    out = (groups - mean) / jnp.sqrt(var + of.epsilon) * scale + bias
    return out.reshape(y.shape), mean[:, 0, 0, 0], var[:, 0, 0, 0]


@pytest.mark.parametrize(("size", "devices"), GROUPS)
def test_statistics_output_and_gradients_are_those_of_the_output(size, devices):
    with jax.enable_x64(True):
        *args, g = arrays()
        of = Normalization(size, 1e-3, None, jnp.float64)
        mesh = tiny.mesh_of(devices)

        def from_input(x, kernel, scale, bias):
            return norm.normalize(Product(x, kernel), scale, bias, of, mesh)

        got, pull = jax.vjp(jax.jit(from_input), *args)
        expected, pull_plain = jax.vjp(lambda *args: from_output(*args, of), *args)
        zeros = jnp.zeros_like(got[1])
        cotangents = jnp.broadcast_to(g[..., None], got[0].shape), zeros, zeros
        pulled = pull(cotangents), pull_plain(cotangents)
        # Sums of at most 240 numbers below 100 in float64.
        assert tiny.difference(got, expected) < 1e-11
        assert tiny.difference(*pulled) < 1e-11


def test_a_scale_of_zero_has_gradients():
    x, kernel, _, bias, g = arrays()
    of = Normalization(4, 1e-5, None, jnp.float32)

    def loss(scale):
        product, mesh = Product(x, kernel), tiny.mesh_of(1)
        out, _, _ = norm.normalize(product, scale, bias, of, mesh)
        return (out * g[..., None]).sum()

    def plain(scale):
        return (from_output(x, kernel, scale, bias, of)[0] * g[..., None]).sum()

    zero = jnp.zeros(24)
    got, expected = jax.grad(loss)(zero), jax.grad(plain)(zero)
    assert float(jnp.abs(expected).max()) > 1
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


@pytest.fixture(scope="module")
def network():
    """A bottleneck network, its variables, none as initialised, and images."""
    model = create_model(
        "resnet26", stage_sizes=(3,), widths=(8,), num_classes=5, bn_group_size=4
    )
    image = draw("image", 8, 32, 32, 3)
    return model, drawn(model, image), image


def drawn(model, image) -> dict:
    """Variables of a network, none of which is as initialised."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + 0.1 * draw(jax.tree_util.keystr(path), *x.shape),
        jax.jit(model.init)(jax.random.key(0), image),
    )


def trained(model, variables, image):
    """Logits and running statistics in training, and gradients by the parameters."""

    def loss(params):
        logits, updated = model.apply(
            variables | {"params": params}, image, train=True, mutable=["batch_stats"]
        )
        return jnp.square(logits).mean(), (logits, updated)

    grads, found = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    return *found, grads


@pytest.fixture(scope="module")
def exact(network):
    """What training gives in float32, with all outputs written."""
    return trained(*network)


def check_same(got, expected) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    # float32 sums of 4 x 8 x 8 pixels in another order, through ten norms.
    for one, other in zip(got, expected, strict=True):
        assert tiny.difference(one, other) < 1e-4


@pytest.mark.slow
def test_a_network_is_the_same_without_its_last_outputs(network, exact):
    model, *others = network
    check_same(trained(model.clone(unwritten=tiny.mesh_of(2)), *others), exact)


@pytest.mark.long
def test_so_is_one_with_scanned_blocks(network):
    model, _, image = network
    model = model.clone(scan_blocks=True)
    variables = drawn(model, image)
    unwritten = model.clone(unwritten=tiny.mesh_of(2))
    check_same(trained(unwritten, variables, image), trained(model, variables, image))


@pytest.mark.slow
def test_bfloat16_is_as_near_to_float32_as_with_them(network, exact):
    model, *others = network
    half = model.clone(dtype=jnp.bfloat16)

    def distance(model) -> float:
        """Of all gradients together, as part of their length."""
        flat = [
            jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(grads)])
            for grads in (trained(model, *others)[2], exact[2])
        ]
        return float(jnp.linalg.norm(flat[0] - flat[1]) / jnp.linalg.norm(flat[1]))

    # Roundings of the same kind, elsewhere: 0.0142 of the length, and 0.0153.
    assert distance(half.clone(unwritten=tiny.mesh_of(1))) < 1.3 * distance(half)


def test_evaluation_and_wide_inputs_take_the_convolution(network):
    model, variables, image = network
    unwritten = model.clone(unwritten=tiny.mesh_of(1))
    np.testing.assert_array_equal(
        unwritten.apply(variables, image), model.apply(variables, image)
    )
    wide = Product(jnp.zeros((2, 3, 3, 512)), jnp.zeros((1, 1, 512, 8)))
    assert not norm.suits(wide, 2, tiny.mesh_of(1))
    assert wide.shape == wide.evaluate().shape


BOTTLENECKS = {
    "model.name": "resnet26",
    "model.overrides": {"stage_sizes": (1,), "widths": (8,), "stem": ((3, 1, 8),)},
    "model.bn_group_size": 2,
}


@pytest.mark.parametrize(
    ("images", "group", "devices", "suits"),
    [
        (16, 2, 8, True),
        (8, 2, 4, True),
        # One group of all images.
        (16, 16, 8, True),
        (16, 16, 2, True),
        # Groups over devices, and more of them than are worth a product each.
        (16, 4, 8, False),
        (16, 8, 4, False),
        (256, 2, 8, False),
        (12, 3, 8, False),
    ],
)
def test_each_device_takes_whole_groups(images, group, devices, suits):
    product = Product(jnp.zeros((images, 1, 1, 8)), jnp.zeros((1, 1, 8, 32)))
    assert norm.suits(product, group, tiny.mesh_of(devices)) == suits


@pytest.mark.parametrize(
    ("chosen", "unwritten"), [("chip", False), (True, True), (False, False)]
)
def test_on_cpus_outputs_are_left_only_where_it_is_asked_for(chosen, unwritten):
    model = tiny.setup(BOTTLENECKS | {"model.unwritten": chosen}).model
    assert model.unwritten == (tiny.mesh_of(8) if unwritten else None)


def test_statistics_are_recomputed_where_a_microbatch_is_a_group():
    # Their step takes the whole batch, of which a device holds part of a group.
    groups = {"optim.microbatches": 2, "model.bn_group_size": 8}
    setup = tiny.setup(BOTTLENECKS | {"model.unwritten": True} | groups)
    programs.compile_statistics_step(setup)


@pytest.mark.slow
def test_devices_exchange_nothing_more():
    def exchanged(unwritten):
        compiled = programs.compile_train_step(
            tiny.setup(BOTTLENECKS | {"model.unwritten": unwritten})
        )
        found = hlo.collectives(compiled.as_text())
        return {one.kind for one in found}, sum(one.elements for one in found)

    assert exchanged(True) == exchanged(False)


def test_a_wrong_word_is_told():
    with pytest.raises(UserError, match=r"model\.unwritten='yes'"):
        tiny.setup({"model.unwritten": "yes"})
