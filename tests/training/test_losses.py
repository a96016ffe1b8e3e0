"""The losses against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.config import defaults
from resnet_jax.errors import UserError
from resnet_jax.training.losses import (
    binary_cross_entropy,
    check,
    cross_entropy,
    distillation,
    make_loss,
    one_hot,
)
from tests.helpers import keyed


def draw(classes: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Draws 16 rows of logits, and their labels."""
    rng = keyed.generator(f"logits of {classes}")
    logits = scale * rng.standard_normal((16, classes), np.float32)
    return logits, keyed.labels(16, classes)


def by_definition(logits, labels, smoothing: float) -> np.ndarray:
    """Computes -sum q log p, where q is the smoothed distribution of the label."""
    logits = logits.astype(np.float64)
    classes = logits.shape[1]
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    q = np.eye(classes)[labels] * (1 - smoothing) + smoothing / classes
    return -(q * log_p).sum(axis=1)


@pytest.mark.parametrize("classes", [2, 10, 1000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy_equals_its_definition(smoothing, classes):
    logits, labels = draw(classes)
    # A few float32 roundings of logits near 10: 10 x 2^-24 each.
    np.testing.assert_allclose(
        cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing),
        by_definition(logits, labels, smoothing),
        atol=5e-6,
    )


def test_logits_far_from_zero_do_not_overflow():
    logits = jnp.array([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4]])
    loss = cross_entropy(logits, jnp.array([0, 2]))
    np.testing.assert_array_equal(loss, [0.0, 2e4])


def test_bfloat16_logits_give_a_float32_loss():
    logits, labels = draw(10)
    rounded = jnp.asarray(logits, jnp.bfloat16)
    loss = cross_entropy(rounded, jnp.asarray(labels), 0.1)
    assert loss.dtype == jnp.float32
    exact = by_definition(np.asarray(rounded), labels, 0.1)
    # The same bound; computed in bfloat16 the loss would be wrong by 10 x 2^-9 = 0.02.
    np.testing.assert_allclose(loss, exact, atol=5e-6)


def test_the_gradient_is_the_difference_of_the_distributions():
    logits, labels = draw(10)

    def loss(logits):
        return cross_entropy(logits, jnp.asarray(labels), 0.1).sum()

    grad = jax.grad(loss)(logits)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    q = np.eye(10)[labels] * 0.9 + 0.01
    # Probabilities are below 1 and carry a few float32 roundings of logits near 10.
    np.testing.assert_allclose(grad, p - q, atol=5e-6)


# Soft labels, and the other losses. tests/oracles/test_optim.py compares with timm's.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_a_one_hot_label_has_the_loss_of_its_class(loss, smoothing):
    config = defaults.get_config()
    config.loss, config.label_smoothing = loss, smoothing
    logits, labels = draw(10)
    loss_of = make_loss(config)
    by_number = loss_of(jnp.asarray(logits), jnp.asarray(labels))
    by_part = loss_of(jnp.asarray(logits), one_hot(jnp.asarray(labels), 10))
    # The sums differ by nine zeros.
    np.testing.assert_allclose(by_part, by_number, rtol=1e-6)


@pytest.mark.parametrize("classes", [2, 1000])
def test_binary_cross_entropy_equals_its_definition(classes):
    logits, labels = draw(classes)
    exact = logits.astype(np.float64)
    q = np.eye(classes)[labels] * 0.9 + 0.1 / classes
    expected = q * np.log1p(np.exp(-exact)) + (1 - q) * np.log1p(np.exp(exact))
    # A few float32 roundings of logits near 10.
    args = jnp.asarray(logits), jnp.asarray(labels), 0.1
    np.testing.assert_allclose(
        binary_cross_entropy(*args), expected.mean(axis=1), atol=5e-6
    )
    np.testing.assert_allclose(
        binary_cross_entropy(*args, sum_classes=True), expected.sum(axis=1), rtol=1e-6
    )


def test_binary_cross_entropy_does_not_overflow():
    logits = jnp.array([[1e4, -1e4], [-1e4, 1e4]])
    loss = binary_cross_entropy(logits, jnp.array([0, 0]))
    np.testing.assert_array_equal(loss, [0.0, 1e4])


def test_a_teacher_with_the_same_logits_has_no_loss():
    logits, _ = draw(10)
    # The differences of equal numbers are rounded.
    assert jnp.abs(distillation(jnp.asarray(logits), jnp.asarray(logits))).max() < 1e-6


def test_the_gradient_of_distillation_does_not_vanish_at_high_temperature():
    logits, _ = draw(10)
    teacher = jnp.asarray(logits[::-1].copy())

    def size(temperature: float) -> float:
        def loss(logits: jax.Array) -> jax.Array:
            return distillation(logits, teacher, temperature).sum()

        return float(jnp.abs(jax.grad(loss)(jnp.asarray(logits))).mean())

    # At high temperature the gradient is (z - v) / classes, which does not depend on T.
    assert size(1000.0) == pytest.approx(size(100.0), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "cross_entrpy"}, r"loss='cross_entrpy'.*cross_entropy"),
        ({"bce_target_threshold": 0.2}, "loss=cross_entropy .*bce_target_threshold"),
        ({"bce_sum_classes": True}, "loss=cross_entropy .*bce_sum_classes"),
        ({"distill.teacher": "resnet18"}, r"distill\.teacher='resnet18'.*teacher_init"),
        ({"distill.teacher_init": "a.pth"}, r"distill\.teacher=''.*teacher_init"),
    ],
)
def test_illegal_losses_are_errors_that_name_the_keys(changes, message):
    config = defaults.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        check(config)
