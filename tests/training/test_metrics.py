"""Ranks of labels and sums of evaluations, also for equal, infinite and NaN logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.training.losses import cross_entropy
from resnet_jax.training.metrics import evaluation_sums, rank_of_label
from tests.helpers import keyed

INF, NAN = np.inf, np.nan


def ranks(rows, labels) -> list[int]:
    """Returns the rank of each row's label."""
    rows, labels = jnp.array(rows, jnp.float32), jnp.array(labels, jnp.int32)
    return rank_of_label(rows, labels).tolist()


def sums(logits, labels, mask=None) -> dict:
    """Returns the sums of an evaluation as Python numbers."""
    logits, labels = jnp.array(logits, jnp.float32), jnp.array(labels, jnp.int32)
    mask = jnp.ones(len(logits), bool) if mask is None else jnp.array(mask)
    out = jax.jit(evaluation_sums)(logits, labels, mask)
    return {key: value.item() for key, value in out.items()}


def test_the_rank_is_the_position_in_the_order_of_logits():
    logits = keyed.generator("logits").standard_normal((50, 7), np.float32)
    labels = keyed.labels(50, 7)
    order = np.argsort(-logits, axis=1)
    expected = np.nonzero(order == labels[:, None])[1]
    assert ranks(logits, labels) == expected.tolist()


def test_equal_logits_rank_by_class():
    row = [1.0, 2.0, 2.0, 2.0, 0.0]
    assert ranks([row] * 5, range(5)) == [3, 0, 1, 2, 4]
    assert ranks([[0.0] * 4] * 4, range(4)) == [0, 1, 2, 3]


def test_the_class_of_argmax_has_rank_0():
    # Three values in twelve classes make ties in every row.
    logits = keyed.generator("ties").integers(3, size=(200, 12)).astype(np.float32)
    labels = np.asarray(jnp.argmax(logits, axis=-1))
    assert ranks(logits, labels) == [0] * 200


def test_infinite_logits_are_ranked():
    assert ranks([[INF, 0.0, 1.0]] * 3, range(3)) == [0, 2, 1]
    assert ranks([[0.0, INF, INF]] * 3, range(3)) == [2, 0, 1]
    assert ranks([[0.0, -INF, 1.0]] * 3, range(3)) == [1, 2, 0]


def test_nan_ranks_before_the_label():
    assert ranks([[NAN, 5.0, 1.0]] * 2, [1, 2]) == [1, 2]


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 6, 10])
def test_a_network_that_outputs_nan_is_never_correct(classes):
    out = sums(np.full((classes, classes), NAN), range(classes))
    assert (out["top1"], out["top5"], out["n"]) == (0, 0, classes)


def test_a_label_whose_logit_is_nan_is_not_correct():
    out = sums([[0.0, 1.0, NAN], [NAN, 0.0, 1.0]], [2, 0])
    assert (out["top1"], out["top5"]) == (0, 0)


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_with_five_classes_or_fewer_every_label_is_among_the_first_five(classes):
    logits = keyed.generator("few").standard_normal((20, classes), np.float32)
    out = sums(logits, keyed.labels(20, classes))
    assert (out["top5"], out["n"]) == (20, 20)


def test_top5_counts_the_first_five_and_not_the_sixth():
    row = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    out = sums([row] * 7, range(7))
    assert (out["top1"], out["top5"], out["n"]) == (1, 5, 7)


def test_counts_are_exact_and_the_loss_is_the_sum_of_the_losses():
    n, classes = 10_000, 10
    logits = keyed.generator("many").standard_normal((n, classes), np.float32)
    labels = keyed.labels(n, classes)
    mask = keyed.generator("mask").random(n) < 0.7
    order = np.argsort(-logits, axis=1)
    out = sums(logits, labels, mask)
    assert out["n"] == mask.sum()
    assert out["top1"] == (order[:, 0] == labels)[mask].sum()
    assert out["top5"] == (order[:, :5] == labels[:, None]).any(axis=1)[mask].sum()
    losses = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    losses = np.asarray(losses, np.float64)
    # A float32 sum of 10,000 numbers, in any order but the worst.
    np.testing.assert_allclose(out["loss"], losses[mask].sum(), rtol=1e-5)


@pytest.mark.parametrize("junk", [0.0, 1e30, INF, NAN])
def test_masked_rows_do_not_change_the_sums(junk):
    logits = keyed.generator("logits").standard_normal((6, 10), np.float32)
    labels = keyed.labels(6, 10)
    padded = np.concatenate([logits, np.full((3, 10), junk, np.float32)])
    padded_labels = np.concatenate([labels, [0, 1, 9]])
    mask = [True] * 6 + [False] * 3
    got, expected = sums(padded, padded_labels, mask), sums(logits, labels)
    # Three zeros are added to a sum of six, perhaps in another order.
    assert got.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
    assert got == expected


def test_the_likeliest_of_several_labels_counts():
    rows = [[3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0]] * 5
    labels = [[6, 0, -1], [4, 5, 6], [5, 6, -1], [1, -1, -1], [-1, -1, -1]]
    out = sums(rows, labels)
    assert (out["top1"], out["top5"], out["n"], out["unlabelled"]) == (1, 3, 4, 1)
    alone = sums(rows[:4], [0, 4, 5, 1])
    assert out["loss"] == alone["loss"]


def test_a_single_label_may_be_padded():
    logits = keyed.generator("logits").standard_normal((9, 10), np.float32)
    labels, mask = keyed.labels(9, 10), [True] * 7 + [False] * 2
    padded = np.full((9, 4), -1)
    padded[:, 2] = labels
    assert sums(logits, padded, mask) == sums(logits, labels, mask)


def test_masked_rows_do_not_count_as_unlabelled():
    out = sums([[0.0, 1.0]] * 3, [[-1], [-1], [1]], [True, False, False])
    assert (out["n"], out["unlabelled"], out["loss"]) == (0, 1, 0.0)


def test_a_nan_logit_of_one_of_several_labels_is_not_correct():
    out = sums([[NAN, 1.0, 0.0]] * 2, [[0, 2], [0, 1]])
    assert (out["top1"], out["n"]) == (0, 2)
