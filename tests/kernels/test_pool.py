"""Max pooling on CPUs equals XLA's, also where maxima are equal."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.kernels.geometry import Geometry
from resnet_jax.kernels.pool import max_pool
from tests.helpers import keyed

SHAPES = [(3, 2, 1, 9, 8), (3, 2, 0, 10, 11), (3, 1, 1, 7, 6), (2, 2, 0, 8, 9)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("side", "stride", "pad", "h", "w"), SHAPES)
def test_output_and_gradient_equal_xlas_where_several_values_are_the_maximum(
    side, stride, pad, h, w, dtype
):
    padding = ((pad, pad), (pad, pad))
    rng = keyed.generator("pool")
    # Five levels, so that most windows contain their maximum more than once.
    x = jnp.asarray(rng.integers(-2, 3, (2, h, w, 4)), dtype)

    def plain(x):
        return nn.max_pool(x, (side, side), (stride, stride), padding)

    expected, pull_plain = jax.vjp(plain, x)
    out, pull = jax.vjp(lambda x: max_pool(x, side, Geometry(stride, padding)), x)
    np.testing.assert_array_equal(out, expected)
    # Whole numbers below 256, which both dtypes add without rounding.
    g = jnp.asarray(rng.integers(-9, 10, out.shape), dtype)
    np.testing.assert_array_equal(pull(g)[0], pull_plain(g)[0])


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_second_derivatives_equal_xlas(dtype, mode):
    """The curvature of a loss and a penalty of its gradient need them."""
    # Whole numbers below 256, which both dtypes represent, without repetition.
    x = keyed.generator("second").permutation(2 * 6 * 6 * 3).reshape(2, 6, 6, 3)
    x = jnp.asarray(x, dtype)

    def gradient(pool):
        return jax.grad(lambda x: jnp.square(pool(x)).sum())

    xlas = gradient(lambda x: nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))))
    # JAX differentiates XLA's again in reverse mode only; the result is symmetric.
    expected = jax.grad(lambda x: xlas(x).sum())(x)
    ours = gradient(lambda x: max_pool(x, 3, Geometry(2, ((1, 1), (1, 1)))))
    if mode == "reverse":
        got = jax.grad(lambda x: ours(x).sum())(x)
    else:
        _, got = jax.jvp(ours, (x,), (jnp.ones_like(x),))
    np.testing.assert_array_equal(got, expected)
