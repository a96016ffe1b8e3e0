"""Predictions of many images as text, CSV or JSON, and as a picture."""

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from resnet_jax.console import output
from resnet_jax.persistence.storage import Path, to_json
from resnet_jax.reports.figures import picture, shorten
from resnet_jax.weights.card import Prediction

# The largest number of images that a picture shows.
MOST_SHOWN = 100


class Row(NamedTuple):
    """The predictions for one image.

    Attributes:
      path: The path of the image, as it was given.
      top: The most probable classes, the best one first.
      logits: All logits, or None if they are not to be printed.
    """

    path: str
    top: Sequence[Prediction]
    logits: Float32[np.ndarray, " classes"] | None = None


def text_lines(rows: Iterable[Row]) -> Iterator[str]:
    """Yields lines for people: each path, and its classes below it."""
    for path, top, logits in rows:
        yield output.one_line(path)
        for prediction in top:
            name = output.one_line(prediction.name)
            yield f"  {100 * prediction.probability:6.2f} %  {name}"
        if logits is not None:
            yield f"  logits: {' '.join(f'{value:.6f}' for value in logits)}"


def columns(k: int, classes: int = 0) -> list[str]:
    """Returns the names of the columns of a table of predictions, without the path.

    They are `top1_name`, `top1_probability` and so on, followed by `logit_0` and so on.

    Args:
      k: The number of the most probable classes that the table has.
      classes: The number of logits that the table has.
    """
    top = [(f"top{place}_name", f"top{place}_probability") for place in range(1, k + 1)]
    return [*itertools.chain(*top), *(f"logit_{index}" for index in range(classes))]


def values(
    top: Sequence[Prediction],
    logits: Float32[np.ndarray, " classes"] | None = None,
) -> list[str | float]:
    """Returns the values of `columns` for one image."""
    row: list[str | float] = []
    for prediction in top:
        row += [prediction.name, prediction.probability]
    return row if logits is None else row + logits.tolist()


def csv_line(row: Sequence[str | float]) -> str:
    """Returns a row of a CSV table, quoted where necessary, without its line break.

    Numbers have nine digits, which tell every float32 from its neighbours.
    """
    text = io.StringIO()
    cells = [f"{cell:.9g}" if isinstance(cell, float) else cell for cell in row]
    # Only characters of the line's end are quoted.
    csv.writer(text, lineterminator="\r\n").writerow(cells)
    return text.getvalue().removesuffix("\r\n")


def csv_lines(rows: Iterable[Row], names: Sequence[str]) -> Iterator[str]:
    """Yields the lines of a CSV table, whose first column is the path.

    Args:
      rows: The predictions of each image.
      names: The names of the other columns, as `columns` returns them.
    """
    rows = iter(rows)
    # An error of the first image comes before the header.
    first = list(itertools.islice(rows, 1))
    yield csv_line(["path", *names])
    for path, top, logits in itertools.chain(first, rows):
        yield csv_line([path, *values(top, logits)])


def json_lines(rows: Iterable[Row], facts: Mapping[str, Any]) -> Iterator[str]:
    """Yields the lines of one JSON document, whose `images` are written one by one.

    Args:
      rows: The predictions of each image.
      facts: The other entries of the document, which precede `images`.
    """
    document = to_json({**facts, "images": []}, indent=2)
    start = document.removesuffix("]\n}")
    before = ""
    for path, top, logits in rows:
        image: dict[str, Any] = {"file": path, "top": [x._asdict() for x in top]}
        if logits is not None:
            image["logits"] = logits.tolist()
        lines = to_json(image, indent=2).replace("\n", "\n    ")
        if before:
            yield f"{before},"
        else:
            yield start
        before = f"    {lines}"
    if before:
        yield before
        yield "  ]\n}"
    else:
        yield document


def draw_predictions(
    path: Path,
    pixels: UInt8[np.ndarray, "n h w c"],
    predictions: Sequence[Sequence[Prediction]],
) -> None:
    """Draws images as a network sees them, each with its most probable classes.

    Args:
      path: The file to write; its suffix says the format.
      pixels: The images, uint8[n, h, w, c].
      predictions: The predictions of each image, the most probable one first.

    Raises:
      UserError: The picture cannot be written.
    """
    columns = min(len(predictions), 5)
    rows = -(-len(predictions) // columns)
    with picture(path, figsize=(3 * columns, 3.6 * rows)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, image, top in zip(grid, pixels, predictions, strict=False):
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            first, *runners_up = (
                f"{shorten(prediction.name)} ({prediction.probability:.2f})"
                for prediction in top
            )
            axes.set_title(first, fontsize=10)
            axes.set_xlabel("\n".join(runners_up[:2]), fontsize=8)
        for axes in figure.axes:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
