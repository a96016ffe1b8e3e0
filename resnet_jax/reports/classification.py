"""Figures of a classifier, computed from the labels and predictions of all images."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from resnet_jax.console import output

# The confidence level of the interval of top-1.
CONFIDENCE = 0.95
# The largest number of classes that a text lists, and the number of the worst ones that
# it lists of more; and the number of the most frequent confusions.
MOST_CLASSES, WORST, CONFUSIONS = 50, 10, 5


def interval(correct: int, images: int) -> list[float]:
    """Returns the 95 % interval of the fraction of correct predictions.

    It is Wilson's score interval without a correction for continuity (Wilson 1927).

    Args:
      correct: The number of correct predictions.
      images: The number of predictions, at least one.

    Examples:
      >>> [round(bound, 4) for bound in interval(90, 100)]
      [0.8256, 0.9448]
    """
    # SciPy takes half a second to import.
    from scipy.stats import binomtest

    found = binomtest(correct, images).proportion_ci(CONFIDENCE, method="wilson")
    return [float(found.low), float(found.high)]


def figures(
    labels: Int[np.ndarray, " n"],
    predicted: Int[np.ndarray, " n"],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Returns the figures of the classes, as scikit-learn computes them.

    A precision without predictions, a recall without images, and an F1 without both
    are 0. The macro averages are means over the classes that occur among the labels or
    the predictions.

    Args:
      labels: The class of each image.
      predicted: The class that is predicted for each image.
      classes: The names of all classes.

    Returns:
      `macro`, the averages `precision`, `recall` and `f1`; `per_class`, for each class
      its `name`, these figures and the numbers of its `images` and of the images for
      which it was `predicted`; and `confusion`, a row for each class, which has the
      number of its images by predicted class.

    Examples:
      >>> result = figures(np.array([0, 0, 1]), np.array([0, 1, 1]), ("cat", "dog"))
      >>> result["confusion"]
      [[1, 1], [0, 1]]
      >>> result["per_class"][1]["precision"]
      0.5
    """
    # scikit-learn takes a second to import.
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    numbers = np.arange(len(classes))
    matrix = confusion_matrix(labels, predicted, labels=numbers)
    scores = precision_recall_fscore_support(
        labels, predicted, labels=numbers, zero_division=0
    )
    precision, recall, f1, images = scores
    occurring = matrix.any(axis=0) | matrix.any(axis=1)
    macro = {
        name: float(values[occurring].mean())
        for name, values in (("precision", precision), ("recall", recall), ("f1", f1))
    }
    per_class = [
        {
            "name": name,
            "images": int(images[i]),
            "predicted": int(matrix[:, i].sum()),
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
        }
        for i, name in enumerate(classes)
    ]
    return {"macro": macro, "per_class": per_class, "confusion": matrix.tolist()}


def class_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Yields a table of the classes, and their most frequent confusions, as text.

    Of more than 50 classes, only the ten with the lowest F1 are listed.

    Args:
      result: The result of `figures`.
    """
    rows = [row for row in result["per_class"] if row["images"] or row["predicted"]]
    if len(rows) > MOST_CLASSES:
        yield f"the {WORST} of {len(rows):,} classes with the lowest F1:"
        rows = sorted(rows, key=lambda row: row["f1"])[:WORST]
    names = [output.one_line(row["name"]) for row in rows]
    width = max(5, *map(len, names))
    yield f"{'class':<{width}}  images  precision  recall      F1"
    for name, row in zip(names, rows, strict=True):
        cells = (100 * row[key] for key in ("precision", "recall", "f1"))
        precision, recall, f1 = (f"{cell:.2f} %" for cell in cells)
        yield (
            f"{name:<{width}}  {row['images']:>6,}  {precision:>9}  {recall:>6}"
            f"  {f1:>6}".rstrip()
        )
    matrix = np.array(result["confusion"])
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:CONFUSIONS]
    names = [output.one_line(row["name"]) for row in result["per_class"]]
    pairs = [
        f"{names[label]} as {names[other]} ({matrix[label, other]:,})"
        for label, other in zip(*np.unravel_index(order, matrix.shape), strict=True)
        if matrix[label, other]
    ]
    if pairs:
        yield f"most frequent errors: {', '.join(pairs)}"


def as_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the figures of several evaluations side by side, a line for each.

    Args:
      results: The results of `weights_evaluation.evaluate_weights`.
    """
    header = ["weights", "top-1", "95 % interval", "top-5", "NLL", "macro F1", "images"]
    rows = [header, *map(_cells, results)]
    if not any("top5" in result for result in results):
        rows = [row[:3] + row[4:] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def _cells(result: Mapping[str, Any]) -> list[str]:
    low, high = result.get("top1_interval", (None, None))
    macro = result.get("macro")
    skipped = len(result["bad_images"])
    return [
        output.one_line(result["weights"]),
        f"{100 * result['top1']:.2f} %",
        "" if low is None else f"{100 * low:.2f} to {100 * high:.2f} %",
        f"{100 * result['top5']:.2f} %" if "top5" in result else "",
        f"{result['loss']:.4f}",
        f"{100 * macro['f1']:.2f} %" if macro else "",
        f"{result['n_seen']:,}" + (f" ({skipped:,} skipped)" if skipped else ""),
    ]
