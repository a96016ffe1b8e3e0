"""The losses against their definitions in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from resnet_jax.config import defaults
from resnet_jax.data.derived_sources import Combined, few_shot
from resnet_jax.data.memory_source import MemorySource
from resnet_jax.errors import UserError
from resnet_jax.training.losses import (
    batch_factors,
    binary_cross_entropy,
    check,
    class_counts,
    class_weights,
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


# Weights of classes. tests/oracles/test_optim.py compares the loss with torch's.

WEIGHTS = np.array([0.2, 0.5, 0.0, 1.0, 4.0], np.float32)


def weighted_by_definition(logits, q) -> np.ndarray:
    """Computes -sum q w log p of each row in float64."""
    logits = logits.astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return -(q * WEIGHTS * log_p).sum(axis=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_losses_are_divided_by_the_weights_of_a_batch_of_classes(smoothing):
    logits, labels = draw(5)
    labels = np.where(labels == 2, 4, labels)
    q = np.eye(5)[labels] * (1 - smoothing) + smoothing / 5
    expected = weighted_by_definition(logits, q).sum() / WEIGHTS[labels].sum()
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(labels), smoothing, WEIGHTS)
    factors = batch_factors(jnp.asarray(labels), WEIGHTS)
    # A few float32 roundings of logits near 10.
    assert float((found * factors).mean()) == pytest.approx(expected, abs=5e-6)
    # One factor for all, so that the parts of a batch add up to it.
    assert len(factors) == 16 and len(set(factors.tolist())) == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_each_class_of_a_mixed_label_has_its_own_weight(smoothing):
    logits, labels = draw(5)
    mixed = 0.7 * np.eye(5)[labels] + 0.3 * np.eye(5)[labels[::-1]]
    q = mixed * (1 - smoothing) + smoothing / 5
    found = cross_entropy(jnp.asarray(logits), jnp.asarray(mixed), smoothing, WEIGHTS)
    # Losses up to 4 x 10, each of a few float32 roundings.
    expected = weighted_by_definition(logits, q)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_inverse_frequencies_are_the_balanced_weights_of_scikit_learn():
    labels = np.repeat([0, 1, 3], [50, 7, 2])
    counts = np.bincount(labels, minlength=5).astype(float)
    found = class_weights(counts, "inverse_frequency", 0.9)
    classes = np.array([0, 1, 3])
    expected = compute_class_weight("balanced", classes=classes, y=labels)
    np.testing.assert_allclose(found[[0, 1, 3]], expected, rtol=1e-7)
    assert found[2] == found[4] == 0


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999])
def test_effective_numbers_are_those_of_the_paper(beta):
    counts = np.array([500.0, 0.0, 20.0, 1.0])
    found = class_weights(counts, "effective_number", beta)
    # E_n = (1 - beta^n) / (1 - beta) is the sum of a geometric series.
    effective = np.array([np.sum(beta ** np.arange(n)) for n in (500, 20, 1)])
    expected = 3 * (1 / effective) / np.sum(1 / effective)
    np.testing.assert_allclose(found[[0, 2, 3]], expected, rtol=1e-6)
    assert found[1] == 0
    assert found.sum() == pytest.approx(3, rel=1e-6)


def labelled(labels) -> MemorySource:
    """Returns images of three classes with given labels."""
    images = np.zeros((len(labels), 2, 2, 1), np.uint8)
    return MemorySource(images, np.array(labels), ("a", "b", "c"))


def test_classes_are_counted_in_the_images_that_are_trained_on():
    source = labelled([0] * 6 + [1] * 2)
    assert class_counts(source, 4).tolist() == [6, 2, 0, 0]
    with_three = labelled([0] * 6 + [1] * 2 + [2] * 3)
    assert class_counts(few_shot(with_three, 2, 0), 3).tolist() == [2, 2, 2]


def test_sources_that_are_combined_by_weight_count_by_their_share_of_an_epoch():
    parts = labelled([0] * 6), labelled([1] * 4 + [2] * 2)
    # Of 12 images of an epoch, 9 are of the first source and 3 of the second one.
    mixed = Combined(parts, (3.0, 1.0))
    np.testing.assert_allclose(class_counts(mixed, 3), [9, 2, 1])
    np.testing.assert_allclose(class_counts(Combined(parts, (1.0, 1.0)), 3), [6, 4, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.class_weights": "inverse"}, "class_weights='inverse'.*inverse_freq"),
        (
            {"data.class_weights": "effective_number", "loss": "binary_cross_entropy"},
            "loss=binary_cross_entropy does not read data.class_weights=effective_num",
        ),
        (
            {"data.class_weights": "effective_number", "data.balance": True},
            "class_weights=effective_number and data.balance=True would correct",
        ),
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
