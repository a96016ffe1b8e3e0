"""Figures of a classifier equal those that scikit-learn and formulas give."""

import re

import numpy as np
import pytest
from sklearn import metrics

from resnet_jax.reports.classification import (
    as_table,
    class_lines,
    figures,
    interval,
)

CASES = [(7, 3, 40), (8, 6, 500), (9, 60, 200), (10, 2, 1)]


def outcomes(seed: int, classes: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Draws labels and predictions; some classes may not occur."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=images)
    noise = rng.integers(classes, size=images)
    return labels, np.where(rng.random(images) < 0.6, labels, noise)


@pytest.mark.parametrize(("seed", "classes", "images"), CASES)
def test_the_figures_equal_sums_over_the_images(seed, classes, images):
    labels, predicted = outcomes(seed, classes, images)
    found = figures(labels, predicted, [str(i) for i in range(classes)])
    matrix = np.zeros((classes, classes), int)
    for label, other in zip(labels, predicted, strict=True):
        matrix[label, other] += 1
    np.testing.assert_array_equal(found["confusion"], matrix)
    for i, row in enumerate(found["per_class"]):
        right = matrix[i, i]
        assert (row["images"], row["predicted"]) == (
            matrix[i].sum(),
            matrix[:, i].sum(),
        )
        assert row["precision"] == pytest.approx(right / max(row["predicted"], 1))
        assert row["recall"] == pytest.approx(right / max(row["images"], 1))
        both = row["images"] + row["predicted"]
        assert row["f1"] == pytest.approx(2 * right / max(both, 1))


@pytest.mark.parametrize(("seed", "classes", "images"), CASES)
def test_macro_averages_equal_those_of_scikit_learn(seed, classes, images):
    labels, predicted = outcomes(seed, classes, images)
    macro = figures(labels, predicted, [str(i) for i in range(classes)])["macro"]
    options = {"average": "macro", "zero_division": 0}
    assert macro == pytest.approx(
        {
            "precision": metrics.precision_score(labels, predicted, **options),
            "recall": metrics.recall_score(labels, predicted, **options),
            "f1": metrics.f1_score(labels, predicted, **options),
        }
    )


def test_an_image_without_a_prediction_counts_for_its_class_alone():
    found = figures(np.array([0, 0, 1]), np.array([0, -1, 1]), ("cat", "dog"))
    assert [row["images"] for row in found["per_class"]] == [2, 1]
    assert found["per_class"][0]["recall"] == 0.5
    assert np.sum(found["confusion"]) == 2


@pytest.mark.parametrize(("correct", "images"), [(0, 7), (7, 7), (1, 2), (930, 1000)])
def test_the_interval_is_that_of_wilson(correct, images):
    # The standard normal quantile of 0.975.
    z, p = 1.959963984540054, correct / images
    middle = (p + z**2 / (2 * images)) / (1 + z**2 / images)
    half = z / (1 + z**2 / images)
    half *= np.sqrt(p * (1 - p) / images + z**2 / (4 * images**2))
    assert interval(correct, images) == pytest.approx([middle - half, middle + half])


def test_a_long_list_of_classes_is_cut_to_the_worst():
    labels, predicted = outcomes(0, 60, 2000)
    names = [f"name {i}" for i in range(60)]
    found = figures(labels, predicted, names)
    lines = list(class_lines(found))
    worst = min(found["per_class"], key=lambda row: row["f1"])
    assert "10 of 60 classes" in lines[0]
    assert lines[2].startswith(worst["name"])
    assert len(lines) == 13


def test_the_most_frequent_errors_are_named():
    labels = np.array([0, 0, 0, 1, 2, 2])
    predicted = np.array([1, 1, 0, 1, 0, 2])
    *_, last = class_lines(figures(labels, predicted, ("cat", "dog", "a\nb")))
    assert last == r"most frequent errors: cat as dog (2), a\nb as cat (1)"


def test_results_stand_side_by_side_without_top5_if_none_has_one():
    result = {"top1": 0.5, "top1_interval": [0.25, 0.75], "loss": 1.5, "n_seen": 4}
    result |= {"weights": "w", "bad_images": ["x.jpg"], "macro": {"f1": 0.4}}
    header, row = as_table([result])
    assert "top-5" not in header
    assert re.split(" {2,}", row)[1:3] == ["50.00 %", "25.00 to 75.00 %"]
    assert row.endswith("4 (1 skipped)")
