"""Every implementation of ghost batch norm in training equals its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.kernels import norm, plain
from resnet_jax.kernels.cpu import norm as cpu_norm
from resnet_jax.kernels.norm_options import GhostBatchNorm
from resnet_jax.kernels.platforms import target_platform
from resnet_jax.models.layers import max_pool
from tests.helpers import keyed, tiny

EPSILON = 1e-3  # Large enough to be seen in the outputs.


def draw(name: str, *shape: int) -> np.ndarray:
    """Draws standard normal float32 values."""
    return keyed.generator(name).standard_normal(shape, np.float32)


def results_by_definition(g, x, scale, bias, settings, pool=None):
    """Returns what the definition computes, and its gradients by its arguments."""

    def outputs(*arrays):
        return plain.batch_norm(*arrays, settings, pool)

    (out, mean, var), pull = jax.vjp(outputs, x, scale, bias)
    return out, mean, var, *pull((g, jnp.zeros_like(mean), jnp.zeros_like(var)))


@pytest.mark.parametrize("size", [1, 3, 6])
def test_the_definition_normalises_each_ghost_batch_by_its_own_statistics(size):
    x, scale, bias = draw("x", 6, 5, 3, 4), 1 + 0.3 * draw("scale", 4), draw("bias", 4)
    arrays = map(jnp.asarray, (x, scale, bias))
    settings = GhostBatchNorm(size, EPSILON, jax.nn.relu, jnp.float32)
    out, mean, var = plain.batch_norm(*arrays, settings)
    batches = x.astype(np.float64).reshape(-1, size, 5, 3, 4)
    means, variances = (
        f(axis=(1, 2, 3), keepdims=True) for f in (batches.mean, batches.var)
    )
    normal = (batches - means) / np.sqrt(variances + EPSILON) * scale + bias
    # Each output is some ten float32 operations on numbers below 10.
    expected = np.maximum(normal, 0).reshape(x.shape)
    np.testing.assert_allclose(out, expected, atol=6e-6)
    np.testing.assert_allclose(mean, means[:, 0, 0, 0], atol=6e-6)
    np.testing.assert_allclose(var, variances[:, 0, 0, 0], atol=6e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.silu])
@pytest.mark.parametrize("implementation", [cpu_norm, norm])
def test_results_and_gradients_equal_those_of_the_definition(
    implementation, activation, dtype
):
    x = jnp.asarray(3 + 2 * draw("x", 6, 5, 3, 4), dtype)
    g = jnp.asarray(draw("g", 6, 5, 3, 4), dtype)
    scale, bias = jnp.asarray(1 + 0.3 * draw("scale", 4)), jnp.asarray(draw("bias", 4))
    near = jnp.asarray(3 + draw("near", 4))

    settings = GhostBatchNorm(3, EPSILON, activation, jnp.dtype(dtype))
    out, mean, var = implementation.forward(x, scale, bias, near, settings)
    gradients = implementation.backward(x, g, scale, bias, mean, var, settings)
    got = out, mean, var, *gradients
    assert got[0].dtype == got[3].dtype == dtype
    expected = results_by_definition(
        g.astype(jnp.float32),
        x.astype(jnp.float32),
        scale,
        bias,
        dataclasses.replace(settings, dtype=jnp.float32),
    )
    # Some thirty float32 operations; or the output and its gradient rounded once to
    # bfloat16's 8 digits, relative to their largest values.
    bounds = [30 * 2**-24] * 6
    if dtype == "bfloat16":
        bounds[0] = bounds[3] = 2**-8
    for ours, defined, bound in zip(got, expected, bounds, strict=True):
        assert tiny.difference(ours.astype(jnp.float32), defined) < bound


@pytest.mark.parametrize("border", ["max", "max_valid"])
@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_pooling_before_the_norm_equals_pooling_after_it(activation, border):
    pool = functools.partial(max_pool, border=border)
    x, g = jnp.asarray(3 + 2 * draw("x", 6, 9, 8, 4)), draw("g", 6, 5, 4, 4)
    # With a negative scale the minimum of the inputs gives the maximum of the outputs.
    scale, bias = jnp.asarray([1.5, -0.7, 0.1, -2.0]), jnp.asarray(draw("bias", 4))
    near = jnp.asarray(3 + draw("near", 4))
    settings = GhostBatchNorm(3, EPSILON, activation, jnp.float32)

    def outputs(x, scale, bias):
        return norm.forward(x, scale, bias, near, settings, pool)

    (out, mean, var), pull = jax.vjp(outputs, x, scale, bias)
    g = jnp.asarray(g[:, : out.shape[1], : out.shape[2]])
    zeros = jnp.zeros_like(mean), jnp.zeros_like(var)
    got = out, mean, var, *pull((g, *zeros))
    expected = results_by_definition(g, x, scale, bias, settings, pool)
    # Some forty float32 operations, relative to the largest values.
    for ours, defined in zip(got, expected, strict=True):
        assert tiny.difference(ours, defined) < 40 * 2**-24


def test_a_large_offset_near_the_running_mean_does_not_cancel_the_variance():
    offset = 4096.0
    x, (scale, bias) = draw("x", 8, 5, 5, 3), (np.ones(3), np.zeros(3))
    _, mean, var = norm.forward(
        *map(jnp.float32, (x + offset, scale, bias, np.full(3, offset + 1))),
        GhostBatchNorm(4, EPSILON, None, jnp.float32),
    )
    batches = (x + np.float32(offset)).astype(np.float64).reshape(-1, 4, 5, 5, 3)
    np.testing.assert_allclose(mean, batches.mean(axis=(1, 2, 3)), rtol=1e-6)
    # Squares of 1 and less, not of 4096: their sum of 100 rounds at 1e-6.
    np.testing.assert_allclose(var, batches.var(axis=(1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_ghost_batch_may_have_more_pixels_than_int32_can_count(platform):
    x = jax.ShapeDtypeStruct((4096, 1024, 1024, 8), jnp.float32)
    vectors = jnp.ones(8), jnp.zeros(8), jnp.zeros(8)
    settings = GhostBatchNorm(4096, EPSILON, None, jnp.float32)

    def total(x):
        return norm.batch_norm(x, *vectors, settings)[0].sum()

    with target_platform(platform):
        assert jax.eval_shape(jax.grad(total), x).shape == x.shape
