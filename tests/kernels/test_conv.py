"""The dispatch computes XLA's convolution on CPUs, and is XLA's elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.kernels import plain, pool
from resnet_jax.kernels.conv import convolve
from resnet_jax.kernels.geometry import Geometry
from resnet_jax.plan import hlo
from tests.helpers import tiny
from tests.helpers.convolutions import KINDS, draw, draw_problem, same


@pytest.mark.parametrize(("k", "geometry", "h", "w", "c", "f"), KINDS)
def test_output_and_gradients_equal_those_of_xlas_convolution(k, geometry, h, w, c, f):
    x, kernel, g = draw_problem(k, geometry, h, w, c, f, "float32")

    def by_xla(x, kernel):
        return plain.convolution(x, kernel, geometry)

    out, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, geometry), x, kernel)
    expected, pull_plain = jax.vjp(by_xla, x, kernel)
    # A few roundings of sums of at most 832 terms of size 1.
    difference = tiny.difference((out, *pull(g)), (expected, *pull_plain(g)))
    assert difference < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("groups", "c", "f", "geometry"),
    [
        (4, 8, 8, Geometry(1, same(1))),
        (32, 128, 64, Geometry(2, same(1))),
        (2, 64, 128, Geometry(1, same(2), 2)),
        (6, 72, 12, Geometry(2, ((0, 1), (0, 1)))),
    ],
)
def test_grouped_convolutions_equal_xlas(groups, c, f, geometry, dtype):
    x, kernel = draw(dtype, 2, 7, 6, c), draw(dtype, 3, 3, c // groups, f)

    def with_gradients(convolution):
        out, pull = jax.vjp(lambda x, k: convolution(x, k, geometry, groups), x, kernel)
        return out, *pull(draw(dtype, *out.shape))

    got = with_gradients(convolve)
    expected = with_gradients(plain.convolution)
    for ours, xlas in zip(got, expected, strict=True):
        assert (ours.shape, ours.dtype) == (xlas.shape, xlas.dtype)
        # Sums of at most 9 x 64 terms, rounded once to the dtype.
        bound = 1e-5 if dtype == "float32" else 2**-7
        assert tiny.difference(ours.astype("float32"), xlas.astype("float32")) < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_gradients_can_be_differentiated_again(mode, dtype):
    """The curvature of a loss and a penalty of its gradient need that."""
    geometry = Geometry(1, same(1))
    x, kernel, _ = draw_problem(3, geometry, 5, 6, 8, 6, dtype)

    def loss(convolution, kernel):
        out = convolution(x, kernel, geometry)
        return jnp.square(out.astype("float32")).sum()

    def product(convolution):
        grad = jax.grad(functools.partial(loss, convolution))
        if mode == "reverse":
            return jax.grad(lambda k: jnp.vdot(grad(k), kernel))(kernel)
        return jax.jvp(grad, (kernel,), (kernel,))[1]

    ours, xlas = (
        product(convolution).astype("float32")
        for convolution in (convolve, plain.convolution)
    )
    # Sums of at most 240 terms, rounded to the dtype in between and at the end.
    bound = 1e-5 if dtype == "float32" else 2**-7
    assert tiny.difference(ours, xlas) < bound


@pytest.mark.parametrize(
    ("k", "geometry", "size", "groups", "f"),
    [
        (3, Geometry(2), 2, 1, 8),
        (7, Geometry(1), 2, 4, 8),
        (1, Geometry(2), 0, 1, 8),
        (3, Geometry(1, same(1)), 5, 1, 0),
    ],
)
def test_empty_outputs_and_their_gradients_equal_xlas(k, geometry, size, groups, f):
    """Images are smaller than the kernel or empty, or there are no features."""
    x, kernel = jnp.ones((2, size, size, 8)), jnp.ones((k, k, 8 // groups, f))

    def with_gradients(convolution):
        out, pull = jax.vjp(lambda x, k: convolution(x, k, geometry, groups), x, kernel)
        return out, *pull(jnp.ones_like(out))

    got, expected = with_gradients(convolve), with_gradients(plain.convolution)
    for ours, xlas in zip(got, expected, strict=True):
        np.testing.assert_array_equal(ours, xlas, strict=True)
    assert got[0].size == 0


def pooled_gradients(x, kernel, geometry, groups=1):
    """Returns gradients through a convolution and a pooling."""

    def loss(x, kernel):
        y = convolve(x, kernel, geometry, groups)
        y = pool.max_pool(y, 3, Geometry(2, same(1)))
        return jnp.square(y.astype(jnp.float32)).sum()

    return jax.grad(loss, (0, 1))(x, kernel)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("k", "groups"), [(1, 1), (3, 1), (3, 4)])
def test_other_platforms_than_cpus_use_xlas_operations(k, groups, dtype):
    geometry = Geometry(1, same(k // 2))
    x, kernel = draw(dtype, 8, 8, 8, 8), draw(dtype, k, k, 8 // groups, 8)
    jitted = jax.jit(pooled_gradients, static_argnums=(2, 3))
    traced = jitted.trace(x, kernel, geometry, groups)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.convolution") == 3
    assert text.count("stablehlo.reduce_window") == 1
    assert text.count("stablehlo.select_and_scatter") == 1
    for operation in ("dot_general", "concatenate", "barrier"):
        assert operation not in text
    text = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "select_and_scatter" not in text
    assert "dot_general" in text


def test_one_exported_program_serves_all_platforms():
    geometry = Geometry(1, same(1))
    x, kernel, _ = draw_problem(3, geometry, 8, 8, 8, 8, "float32")
    function = jax.jit(functools.partial(pooled_gradients, geometry=geometry))
    exported = jax.export.export(function, platforms=("cpu", "tpu"))(x, kernel)
    difference = tiny.difference(exported.call(x, kernel), function(x, kernel))
    assert difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_grouped_convolution_keeps_the_batch_on_its_devices(stride, dtype):
    geometry = Geometry(stride, same(1))
    x, kernel = draw(dtype, 8, 8, 8, 64), draw(dtype, 3, 3, 8, 64)
    g = draw(dtype, 8, 8 // stride, 8 // stride, 64)

    def function(x, kernel, g):
        out, pull = jax.vjp(lambda x, k: convolve(x, k, geometry, 8), x, kernel)
        return out, *pull(g)

    mesh = tiny.mesh_of(8)
    sharded, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    on_all = jax.jit(
        function,
        in_shardings=(sharded, replicated, sharded),
        out_shardings=(sharded, sharded, replicated),
    )
    program = on_all.lower(x, kernel, g).compile().as_text()
    assert {each.kind for each in hlo.collectives(program)} == {"all-reduce"}
    # Sums of eight parts, each rounded to the dtype.
    bound = 1e-5 if dtype == "float32" else 2**-6
    got, expected = (
        jax.tree.map(lambda a: a.astype(jnp.float32), f(x, kernel, g))
        for f in (on_all, jax.jit(function))
    )
    assert tiny.difference(got, expected) < bound
