"""Cross entropy against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.losses import cross_entropy
from tests import keyed


def draw(classes: int, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Draws 16 rows of logits, and labels."""
    rng = keyed.generator(f"logits of {classes}")
    logits = scale * rng.standard_normal((16, classes), np.float32)
    return logits, keyed.labels(16, classes)


def by_definition(logits, labels, smoothing: float) -> np.ndarray:
    """-sum of q log p, with q of the true class 1 - smoothing + smoothing / K."""
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
    # As above; computed in bfloat16 the loss would be wrong by 10 x 2^-9 = 0.02.
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
