"""Max pooling on CPUs is XLA's, ties included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.kernels.cpu.conv import Geometry
from resnet_jax.kernels.pool import max_pool
from tests.helpers import keyed

SHAPES = [(3, 2, 1, 9, 8), (3, 2, 0, 10, 11), (3, 1, 1, 7, 6), (2, 2, 0, 8, 9)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("side", "stride", "pad", "h", "w"), SHAPES)
def test_output_and_gradient_are_xlas_where_values_are_equal(
    side, stride, pad, h, w, dtype
):
    padding = ((pad, pad), (pad, pad))
    rng = keyed.generator("pool")
    # Five levels, so that most windows have their greatest value more than once.
    x = jnp.asarray(rng.integers(-2, 3, (2, h, w, 4)), dtype)

    def plain(x):
        return nn.max_pool(x, (side, side), (stride, stride), padding)

    expected, pull_plain = jax.vjp(plain, x)
    out, pull = jax.vjp(lambda x: max_pool(x, side, Geometry(stride, padding)), x)
    np.testing.assert_array_equal(out, expected)
    # Whole numbers below 256, which both types add without rounding.
    g = jnp.asarray(rng.integers(-9, 10, out.shape), dtype)
    np.testing.assert_array_equal(pull(g)[0], pull_plain(g)[0])


@pytest.mark.parametrize("over", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_derivatives_are_those_of_xlas(dtype, over):
    """As the curvature of a loss is computed, and a penalty of its gradient."""
    # Whole numbers below 256, which both types hold, and none of them twice.
    x = keyed.generator("second").permutation(2 * 6 * 6 * 3).reshape(2, 6, 6, 3)
    x = jnp.asarray(x, dtype)

    def gradient(pool):
        return jax.grad(lambda x: jnp.square(pool(x)).sum())

    xlas = gradient(lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
    # JAX has this in reverse alone; what is found is symmetric.
    expected = jax.grad(lambda x: xlas(x).sum())(x)
    ours = gradient(lambda x: max_pool(x, 3, Geometry(2, ((1, 1), (1, 1)))))
    if over == "reverse":
        found = jax.grad(lambda x: ours(x).sum())(x)
    else:
        _, found = jax.jvp(ours, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_winners_are_written(dtype):
    """XLA would find them anew for each tap."""

    def gradient(x):
        return jax.grad(lambda x: max_pool(x, 3, Geometry(2)).sum())(x)

    program = jax.jit(gradient).lower(jnp.zeros((2, 8, 8, 4), dtype)).compile()
    _, _, entry = program.as_text().partition("ENTRY")
    assert "= u8[" in entry
