"""Predictions of many images as text, CSV or JSON, and as a picture."""

import contextlib
import csv
import io
import itertools
import pathlib
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from resnet_jax.console import output
from resnet_jax.errors import UserError
from resnet_jax.persistence.storage import Path, commit, explaining_errors, to_json
from resnet_jax.reports.figures import picture, shorten
from resnet_jax.weights.card import Prediction

# The largest number of images that a picture shows.
MOST_SHOWN = 100
# The number of rows that are written to a file at once.
ROWS = 256


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


class PredictionTable:
    """A file of predictions, CSV or Parquet, that is written as they come.

    Its columns are `path`, `label` and those of `columns`. Some hundred rows are in
    memory at a time. It is used in `with`. The file exists completely or not at all: if
    an exception ends the `with`, what was at the path before stays.

    Args:
      path: The file, whose suffix is `.csv` or `.parquet`.
      k: The number of the most probable classes that the table has.
      logits: The number of logits that the table has; 0 leaves them out.

    Raises:
      UserError: The file cannot be written.
    """

    def __init__(self, path: pathlib.Path, k: int, logits: int = 0):
        self.k = k
        self._has_logits = bool(logits)
        self._path = path
        # The name is short, since a file system limits names to 255 bytes.
        self._partial = path.with_name(f".{secrets.token_hex(8)}.partial")
        self._names = ["path", "label", *columns(k, logits)]
        self._rows: list[list[str | float]] = []
        self._files = contextlib.ExitStack()

    def __enter__(self) -> "PredictionTable":
        try:
            self._open()
        except UserError:
            self._files.close()
            self._remove_partial()
            raise
        return self

    def _open(self) -> None:
        with explaining_errors(self._path):
            if self._path.suffix == ".parquet":
                self._open_parquet()
            else:
                # The name of a file need not be text in UTF-8.
                self._file = self._partial.open(
                    "w", encoding="utf-8", errors="surrogateescape", newline=""
                )
                self._file.write(csv_line(self._names) + "\r\n")

    def _open_parquet(self) -> None:
        # pyarrow takes half a second to import.
        import pyarrow
        from pyarrow import parquet

        texts = {"path", "label"} | {x for x in self._names if x.endswith("_name")}
        self._schema = pyarrow.schema(
            (name, pyarrow.string() if name in texts else pyarrow.float32())
            for name in self._names
        )
        # The writer would leave a file of its own open after an error.
        stream = self._files.enter_context(self._partial.open("wb", buffering=0))
        self._file = parquet.ParquetWriter(stream, self._schema)

    def add(
        self,
        path: str,
        label: str,
        top: Sequence[Prediction],
        logits: Float32[np.ndarray, " classes"],
    ) -> None:
        """Adds an image.

        Args:
          path: The name of the image.
          label: The name of its class.
          top: Its k most probable classes.
          logits: Its logits.
        """
        cells = values(top, logits if self._has_logits else None)
        self._rows.append([path, label, *cells])
        if len(self._rows) == ROWS:
            self._flush()

    def _flush(self) -> None:
        with explaining_errors(self._path):
            if self._path.suffix == ".parquet":
                import pyarrow

                path, *others = zip(*self._rows, strict=True)
                # Parquet has no bytes in texts, so a name that is not text is escaped.
                paths = [x.encode(errors="backslashreplace").decode() for x in path]
                cells = [pyarrow.array(x) for x in (paths, *others)]
                table = pyarrow.Table.from_arrays(cells, self._names)
                self._file.write(table.cast(self._schema))
            else:
                lines = (csv_line(row) + "\r\n" for row in self._rows)
                self._file.writelines(lines)
        self._rows = []

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            if self._rows and not kind:
                self._flush()
            with explaining_errors(self._path):
                self._file.close()
                if not kind:
                    commit(self._partial, self._path)
        finally:
            self._files.close()
            self._remove_partial()

    def _remove_partial(self) -> None:
        # The disk may be full, and other files may need the space.
        with contextlib.suppress(OSError):
            self._partial.unlink()


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
