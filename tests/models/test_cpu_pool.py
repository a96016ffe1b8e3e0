"""Max pooling on CPUs is XLA's, ties included."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models.cpu_forms import Geometry
from resnet_jax.models.cpu_pool import max_pool
from tests import keyed

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_derivatives_are_those_of_xlas(dtype):
    x = keyed.generator("second").permutation(2 * 6 * 6 * 4).reshape(2, 6, 6, 4)
    # Whole numbers and their squares, which both types hold.
    x = jnp.asarray(x % 15, dtype)

    def twice(pool):
        return jax.grad(lambda x: jax.grad(lambda x: (pool(x) ** 3).sum())(x).sum())(x)

    plain = twice(lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
    found = twice(lambda x: max_pool(x, 3, Geometry(2, ((1, 1), (1, 1)))))
    np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_winners_are_written(dtype):
    """XLA would find them anew for each tap."""

    def gradient(x):
        return jax.grad(lambda x: max_pool(x, 3, Geometry(2)).sum())(x)

    program = jax.jit(gradient).lower(jnp.zeros((2, 8, 8, 4), dtype)).compile()
    _, _, entry = program.as_text().partition("ENTRY")
    assert "= u8[" in entry
