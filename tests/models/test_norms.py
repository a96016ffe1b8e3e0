"""Batch norm by groups of examples, against numpy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.kernels.cpu import norm as cpu_norm
from resnet_jax.kernels.platforms import known
from resnet_jax.models import ZOO, build, norms
from resnet_jax.models.layers import max_pool
from resnet_jax.models.norms import BatchNorm, Normalization
from tests.helpers import keyed, tiny

EPSILON = 1e-3  # large enough to be seen in the outputs
# Each output is some ten float32 operations on numbers below 10: 10 x 10 x 2^-24.
ROUNDING = 6e-6


def draw(name: str, *shape: int) -> np.ndarray:
    """Draws standard normal float32 values."""
    return keyed.generator(name).standard_normal(shape, np.float32)


def draw_variables(channels: int) -> dict:
    """Draws scale, bias and running statistics, none at its initial value."""
    return {
        "params": {
            "scale": 1 + 0.3 * draw("scale", channels),
            "bias": draw("bias", channels),
        },
        "batch_stats": {
            "mean": draw("mean", channels),
            "var": np.exp(draw("var", channels)),
        },
    }


def train(norm: BatchNorm, variables: dict, x) -> tuple[np.ndarray, dict]:
    """Returns the output in training mode and the new running statistics."""
    x = jnp.asarray(x)
    out, updated = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    return out, updated["batch_stats"]


def by_group(x: np.ndarray, size: int) -> np.ndarray:
    """Cuts a batch into groups, in float64: `groups size h w c`."""
    return x.astype(np.float64).reshape(-1, size, *x.shape[1:])


@pytest.mark.parametrize("size", [1, 2, 3, 6, None])
def test_each_group_is_normalised_by_its_own_statistics(size):
    x, variables = draw("x", 6, 5, 3, 4), draw_variables(4)
    groups = by_group(x, size or 6)
    mean = groups.mean(axis=(1, 2, 3), keepdims=True)
    var = groups.var(axis=(1, 2, 3), keepdims=True)
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    expected = (groups - mean) / np.sqrt(var + EPSILON) * scale + bias
    out, _ = train(BatchNorm(size, epsilon=EPSILON), variables, x)
    np.testing.assert_allclose(out, expected.reshape(x.shape), atol=ROUNDING)


def test_an_image_changes_its_own_group_only():
    x, variables = draw("x", 6, 5, 3, 4), draw_variables(4)
    changed = x.copy()
    changed[3] += 1
    norm = BatchNorm(2)
    before, after = train(norm, variables, x)[0], train(norm, variables, changed)[0]
    differ = [bool((before[i] != after[i]).any()) for i in range(6)]
    assert differ == [False, False, True, True, False, False]


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("size", [1, 3, None])
def test_running_statistics_follow_the_mean_over_groups(size, unbiased):
    x, variables = draw("x", 6, 5, 3, 4), draw_variables(4)
    groups = by_group(x, size or 6)
    n = (size or 6) * 5 * 3
    # Each group's own sum of squares over n - 1, as torch has it, or n.
    squares = np.square(groups - groups.mean(axis=(1, 2, 3), keepdims=True))
    var = (squares.sum(axis=(1, 2, 3)) / (n - 1 if unbiased else n)).mean(axis=0)
    mean = groups.mean(axis=(0, 1, 2, 3))
    _, stats = train(BatchNorm(size, momentum=0.75, unbiased=unbiased), variables, x)
    before = variables["batch_stats"]
    for key, value in {"mean": mean, "var": var}.items():
        expected = 0.75 * before[key] + 0.25 * value
        # The smallest effect of n - 1 is 1/90 of the variance, a thousand times this.
        np.testing.assert_allclose(stats[key], expected, atol=ROUNDING, err_msg=key)


def test_a_large_offset_does_not_cancel_the_variance():
    offset = 4096.0
    x, variables = draw("x", 8, 5, 5, 3) + np.float32(offset), draw_variables(3)
    out, stats = train(BatchNorm(4, momentum=0.0, unbiased=False), variables, x)
    groups = by_group(x, 4)
    var = groups.var(axis=(1, 2, 3), keepdims=True)
    # The float32 mean is wrong by at most some 4096 x 2^-24 = 2e-4, and the variance by
    # the square of that. In one pass, E[x^2] - E[x]^2 would be wrong by about
    # 4096^2 x 2^-24 = 1.
    np.testing.assert_allclose(stats["var"], var.mean(axis=(0, 1, 2, 3)), rtol=1e-5)
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    centred = groups - groups.mean(axis=(1, 2, 3), keepdims=True)
    expected = centred / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(out, expected.reshape(x.shape), atol=1e-3)


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    x, variables = draw("x", 5, 4, 3, 4), draw_variables(4)
    norm = BatchNorm(2, epsilon=EPSILON)  # 5 is no multiple of 2, which is no matter
    out, updated = norm.apply(
        variables, jnp.asarray(x), train=False, mutable=["batch_stats"]
    )
    mean, var = (variables["batch_stats"][key] for key in ("mean", "var"))
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    expected = (x - mean) / np.sqrt(var.astype(np.float64) + EPSILON) * scale + bias
    # Running variances as small as exp(-2) make the outputs a few times larger.
    np.testing.assert_allclose(out, expected, atol=4 * ROUNDING)
    for key, value in variables["batch_stats"].items():
        np.testing.assert_array_equal(updated["batch_stats"][key], value)


def test_statistics_start_at_mean_zero_and_variance_one():
    x = jnp.asarray(draw("x", 2, 3, 3, 4))
    variables = BatchNorm().init(jax.random.key(0), x, train=True)
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(4))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(4))


@pytest.mark.parametrize("size", [4, 5, 12])
def test_a_group_size_that_does_not_divide_the_batch_is_refused(size):
    with pytest.raises(ValueError, match=f"batch of 6 .* ghost batches of {size}"):
        train(BatchNorm(size), draw_variables(4), draw("x", 6, 5, 3, 4))


def test_a_bfloat16_batch_has_float32_statistics():
    x = jnp.asarray(10 + draw("x", 6, 5, 3, 4), jnp.bfloat16)
    norm = BatchNorm(3, momentum=0.0, unbiased=False, dtype=jnp.bfloat16)
    out, stats = train(norm, draw_variables(4), x)
    assert out.dtype == jnp.bfloat16
    assert {value.dtype for value in stats.values()} == {jnp.dtype("float32")}
    groups = by_group(np.asarray(x), 3)
    # Sums of 45 numbers near 10 in float32; in bfloat16 they would be wrong by 2^-9.
    np.testing.assert_allclose(stats["mean"], groups.mean(axis=(0, 1, 2, 3)), rtol=1e-6)
    var = groups.var(axis=(1, 2, 3)).mean(axis=0)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-5)


@pytest.mark.parametrize("size", [2, None])
def test_gradients_equal_those_of_a_plain_formula(size):
    x, weights = draw("x", 6, 5, 3, 4), draw("weights", 6, 5, 3, 4)
    variables = draw_variables(4)

    def ours(params, x):
        out, _ = train(BatchNorm(size), variables | {"params": params}, x)
        return jnp.sum(weights * out)

    def plain(params, x):
        parts = jnp.split(x, 6 // (size or 6))
        out = jnp.concatenate(
            [
                params["scale"]
                * (part - part.mean((0, 1, 2)))
                / jnp.sqrt(part.var((0, 1, 2)) + 1e-5)
                + params["bias"]
                for part in parts
            ]
        )
        return jnp.sum(weights * out)

    got, expected = (
        jax.jit(jax.grad(function, argnums=(0, 1)))(variables["params"], x)
        for function in (ours, plain)
    )
    # Two orders of summing 90 float32 products of size 1: about sqrt(90) x 2^-24.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, expected
    )


def by_definition(x, scale, bias, of):
    """`norms.forward`, in two passes over groups cut out of the batch."""
    groups = x.reshape(-1, of.size, *x.shape[1:])
    mean = groups.mean((1, 2, 3), keepdims=True)
    var = jnp.square(groups - mean).mean((1, 2, 3), keepdims=True)
    out = (groups - mean) / jnp.sqrt(var + of.epsilon) * scale + bias
    out = of.activation(out) if of.activation else out
    return out.reshape(x.shape).astype(of.dtype), mean[:, 0, 0, 0], var[:, 0, 0, 0]


def pulled_by_definition(g, x, scale, bias, of, pool=None):
    """What that gives, and the gradients by its arguments."""

    def outputs(*arguments):
        out, mean, var = by_definition(*arguments, of)
        return pool(out) if pool else out, mean, var

    (out, mean, var), pull = jax.vjp(outputs, x, scale, bias)
    return out, mean, var, *pull((g, jnp.zeros_like(mean), jnp.zeros_like(var)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", [None, jax.nn.relu, jax.nn.silu])
@pytest.mark.parametrize("ours", [cpu_norm, norms])
def test_each_platforms_norm_and_gradients_are_those_of_the_definition(
    ours, activation, dtype
):
    x = jnp.asarray(3 + 2 * draw("x", 6, 5, 3, 4), dtype)
    g = jnp.asarray(draw("g", 6, 5, 3, 4), dtype)
    scale, bias = map(jnp.asarray, draw_variables(4)["params"].values())
    near = jnp.asarray(3 + draw("near", 4))

    of = Normalization(3, EPSILON, activation, jnp.dtype(dtype))
    out, mean, var = ours.forward(x, scale, bias, near, of)
    got = out, mean, var, *ours.backward(x, g, scale, bias, mean, var, of)
    assert got[0].dtype == got[3].dtype == dtype
    expected = pulled_by_definition(
        g.astype(jnp.float32),
        x.astype(jnp.float32),
        scale,
        bias,
        dataclasses.replace(of, dtype=jnp.float32),
    )
    # Some thirty float32 operations; or the output and its gradient rounded once to
    # bfloat16's 8 digits, as parts of their largest values.
    bounds = [30 * 2**-24] * 6
    if dtype == "bfloat16":
        bounds[0] = bounds[3] = 2**-8
    for one, other, bound in zip(got, expected, bounds, strict=True):
        assert tiny.difference(one.astype(jnp.float32), other) < bound


@pytest.mark.parametrize("border", ["max", "max_valid"])
@pytest.mark.parametrize("activation", [None, jax.nn.relu])
def test_pooling_before_the_norm_is_pooling_behind_it(activation, border):
    pool = functools.partial(max_pool, border=border)
    x, g = jnp.asarray(3 + 2 * draw("x", 6, 9, 8, 4)), draw("g", 6, 5, 4, 4)
    _, bias = draw_variables(4)["params"].values()
    # By a negative scale the least input is the greatest output.
    scale = jnp.asarray([1.5, -0.7, 0.1, -2.0])
    near = jnp.asarray(3 + draw("near", 4))

    of = Normalization(3, EPSILON, activation, jnp.float32)

    def outputs(x, scale, bias):
        return norms.forward(x, scale, bias, near, of, pool)

    (out, mean, var), pull = jax.vjp(outputs, x, scale, bias)
    g = jnp.asarray(g[:, : out.shape[1], : out.shape[2]])
    zeros = jnp.zeros_like(mean), jnp.zeros_like(var)
    got = out, mean, var, *pull((g, *zeros))
    expected = pulled_by_definition(g, x, scale, bias, of, pool)
    # Some forty float32 operations, as parts of the largest values.
    for one, other in zip(got, expected, strict=True):
        assert tiny.difference(one, other) < 40 * 2**-24


@pytest.mark.parametrize("train", [False, True])
def test_a_network_that_pools_in_its_norm_is_one_that_does_not(train):
    changes = {"stage_sizes": (1, 1), "widths": (8, 16), "num_classes": 0}
    spec = dataclasses.replace(ZOO["resnet18"].spec, **changes)
    model, variables = build(spec, bn_group_size=2), keyed.variables(spec)
    apply = functools.partial(
        model.apply,
        variables,
        jnp.asarray(draw("x", 4, 65, 65, 3)),
        train=train,
        mutable=["batch_stats"],
    )
    # With `C1`, pooling has the norm's output before it.
    (pooled, stats), (features, expected) = apply(), apply(features=True)
    np.testing.assert_array_equal(pooled, features["C3"].mean(axis=(1, 2)))
    jax.tree.map(np.testing.assert_array_equal, stats, expected)


def test_a_large_offset_near_the_running_mean_does_not_cancel_the_variance():
    offset = 4096.0
    x, (scale, bias) = draw("x", 8, 5, 5, 3), (np.ones(3), np.zeros(3))
    _, mean, var = norms.forward(
        *map(jnp.float32, (x + offset, scale, bias, np.full(3, offset + 1))),
        Normalization(4, EPSILON, None, jnp.float32),
    )
    groups = by_group(x + np.float32(offset), 4)
    np.testing.assert_allclose(mean, groups.mean(axis=(1, 2, 3)), rtol=1e-6)
    # Squares of 1 and less, not of 4096: their sum of 100 rounds at 1e-6.
    np.testing.assert_allclose(var, groups.var(axis=(1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_group_has_more_pixels_than_integers_of_32_bits_can_count(platform):
    variables = draw_variables(8)
    x = jax.ShapeDtypeStruct((4096, 1024, 1024, 8), jnp.float32)

    def total(x):
        return train(BatchNorm(), variables, x)[0].sum()

    with known(platform):
        assert jax.eval_shape(jax.grad(total), x).shape == x.shape
