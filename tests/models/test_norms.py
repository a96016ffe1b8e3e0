"""Batch norm over ghost batches, compared with numpy in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import ZOO, build
from resnet_jax.models.norms import BatchNorm
from tests.helpers import keyed

EPSILON = 1e-3  # Large enough to be seen in the outputs.
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


def by_ghost_batch(x: np.ndarray, size: int) -> np.ndarray:
    """Cuts a batch into ghost batches in float64: `batches size h w c`."""
    return x.astype(np.float64).reshape(-1, size, *x.shape[1:])


@pytest.mark.parametrize("size", [1, 2, 3, 6, None])
def test_each_ghost_batch_is_normalised_by_its_own_statistics(size):
    x, variables = draw("x", 6, 5, 3, 4), draw_variables(4)
    batches = by_ghost_batch(x, size or 6)
    mean = batches.mean(axis=(1, 2, 3), keepdims=True)
    var = batches.var(axis=(1, 2, 3), keepdims=True)
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    expected = (batches - mean) / np.sqrt(var + EPSILON) * scale + bias
    out, _ = train(BatchNorm(size, epsilon=EPSILON), variables, x)
    np.testing.assert_allclose(out, expected.reshape(x.shape), atol=ROUNDING)


def test_an_image_changes_only_its_own_ghost_batch():
    x, variables = draw("x", 6, 5, 3, 4), draw_variables(4)
    changed = x.copy()
    changed[3] += 1
    norm = BatchNorm(2)
    before, after = train(norm, variables, x)[0], train(norm, variables, changed)[0]
    differ = [bool((before[i] != after[i]).any()) for i in range(6)]
    assert differ == [False, False, True, True, False, False]


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("size", [1, 3, None])
def test_running_statistics_follow_the_mean_over_ghost_batches(size, unbiased):
    x, variables = draw("x", 6, 5, 3, 4), draw_variables(4)
    batches = by_ghost_batch(x, size or 6)
    n = (size or 6) * 5 * 3
    # Each ghost batch's sum of squares over n - 1, as in torch, or over n.
    squares = np.square(batches - batches.mean(axis=(1, 2, 3), keepdims=True))
    var = (squares.sum(axis=(1, 2, 3)) / (n - 1 if unbiased else n)).mean(axis=0)
    mean = batches.mean(axis=(0, 1, 2, 3))
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
    batches = by_ghost_batch(x, 4)
    var = batches.var(axis=(1, 2, 3), keepdims=True)
    # The float32 mean is wrong by at most some 4096 x 2^-24 = 2e-4, and the variance by
    # the square of that. In one pass, E[x^2] - E[x]^2 would be wrong by about
    # 4096^2 x 2^-24 = 1.
    np.testing.assert_allclose(stats["var"], var.mean(axis=(0, 1, 2, 3)), rtol=1e-5)
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    centred = batches - batches.mean(axis=(1, 2, 3), keepdims=True)
    expected = centred / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(out, expected.reshape(x.shape), atol=1e-3)


def test_evaluation_uses_the_running_statistics_and_does_not_change_them():
    x, variables = draw("x", 5, 4, 3, 4), draw_variables(4)
    norm = BatchNorm(2, epsilon=EPSILON)  # In evaluation it need not divide 5.
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
def test_a_group_size_that_does_not_divide_the_batch_is_an_error(size):
    with pytest.raises(ValueError, match=f"batch of 6 .* ghost batches of {size}"):
        train(BatchNorm(size), draw_variables(4), draw("x", 6, 5, 3, 4))


def test_a_bfloat16_batch_has_float32_statistics():
    x = jnp.asarray(10 + draw("x", 6, 5, 3, 4), jnp.bfloat16)
    norm = BatchNorm(3, momentum=0.0, unbiased=False, dtype=jnp.bfloat16)
    out, stats = train(norm, draw_variables(4), x)
    assert out.dtype == jnp.bfloat16
    assert {value.dtype for value in stats.values()} == {jnp.dtype("float32")}
    batches = by_ghost_batch(np.asarray(x), 3)
    # Sums of 45 numbers near 10 in float32; in bfloat16 they would be wrong by 2^-9.
    np.testing.assert_allclose(
        stats["mean"], batches.mean(axis=(0, 1, 2, 3)), rtol=1e-6
    )
    var = batches.var(axis=(1, 2, 3)).mean(axis=0)
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


@pytest.mark.parametrize("train", [False, True])
def test_pooling_inside_the_norm_does_not_change_a_network(train):
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
    # With the feature `C1`, the norm's output is computed before pooling.
    (pooled, stats), (features, expected) = apply(), apply(features=True)
    np.testing.assert_array_equal(pooled, features["C3"].mean(axis=(1, 2)))
    jax.tree.map(np.testing.assert_array_equal, stats, expected)
