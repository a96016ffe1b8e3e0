"""Writers of a run's metrics: console, progress bar, metrics.jsonl, TensorBoard."""

import json
import math
import os
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any

import tqdm
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from resnet_jax.console import output
from resnet_jax.console.output import ByProduct, reason_of, say
from resnet_jax.errors import UserError
from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import Path


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Reads the rows of `metrics.jsonl`.

    A last line that was cut off is what a killed run leaves, and is left out. If other
    lines are damaged, one warning says so.

    Args:
      workdir: The directory of a run.

    Returns:
      The rows, each with its `step`. There are none if there is no such file.

    Raises:
      UserError: The file cannot be read.
    """
    rows, damage = _read_rows(workdir / "metrics.jsonl")
    if damage and not rows:
        raise UserError(f"{damage} The run writes a new one when it resumes.")
    if damage:
        output.warn(f"{damage} The other lines are used.")
    return rows


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Returns the intact rows, and a sentence on what is damaged, or ''."""
    try:
        with storage.explaining_errors(path.parent):
            # Reading a named pipe in place of the file would wait for ever.
            if not path.is_file():
                is_taken = not storage.is_remote(path) and os.path.lexists(path)
                return [], f"{path} is not a file." if is_taken else ""
            content = storage.read(path)
    except (OSError, UserError) as error:
        return [], f"{path} cannot be read: {reason_of(error)}."
    lines = content.splitlines()
    rows = [_row(line) for line in lines]
    # A killed process can only cut the last row, but a power cut can also leave zeros
    # in place of it.
    is_complete = content.endswith((b"\n", b"}", b"\0"))
    if lines and not is_complete and lines[-1].startswith(b"{"):
        rows.pop()
    damaged = rows.count(None)
    return (
        [row for row in rows if row],
        f"{damaged} of {len(rows)} lines of {path} are damaged." if damaged else "",
    )


def _row(line: bytes) -> dict[str, Any] | None:
    """Returns the row of a line, or None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    # JSON has no name for a number that is not finite.
    return {key: math.nan if x is None else x for key, x in row.items()}


def points(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Returns the steps and values of a metric, for a plot.

    Args:
      rows: The rows of `read_metrics`.
      key: The name of the metric, such as `eval/loss`.
    """
    return [
        (row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)
    ]


class _Board:
    """Writes scalars to an event file of TensorBoard.

    tensorboardX's own writer is not used: when a full disk ends its thread, the next
    scalar waits for the thread for ever.

    Args:
      folder: The folder of the event files.
      step: The step at which the run starts. The file makes TensorBoard discard what
        older event files hold after that step.
    """

    def __init__(self, folder: Path, step: int):
        storage.make_way(folder, pathlib.Path.is_dir)
        storage.make_directory(folder)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._file = storage.GrowingFile(folder / name, interval=30.0)
        self._write(Event(file_version="brain.Event:2"))
        if step:
            start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
            self._write(Event(step=step + 1, session_log=start))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes the scalars of a step, by tag."""
        self._write(
            *(
                Event(step=step, summary=summary.scalar(key, value))
                for key, value in values.items()
            )
        )

    def _write(self, *events: Event) -> None:
        for event in events:
            event.wall_time = time.time()
        self._file.add(b"".join(_record(event.SerializeToString()) for event in events))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _record(data: bytes) -> bytes:
    """Frames an event as in a TFRecord file: length, data, and a checksum of each."""
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return b"".join((length, next(checksums), data, next(checksums)))


class Writer:
    """Writes the metrics of a run to the console and to files.

    The files and the progress bar are by-products: their failure is one warning and
    does not end the run.

    Args:
      workdir: The directory of the run.
      step: The step at which the run starts. Rows of later steps, which an interrupted
        process has written, are dropped.
      total_steps: The step at which the run ends.
      active: False for processes that write nothing, which are all but the lead
        process of a run.
    """

    def __init__(self, workdir: Path, *, step: int, total_steps: int, active: bool):
        self._active = active
        self._total = total_steps
        if not active:
            return

        def open_metrics() -> storage.GrowingFile:
            path = workdir / "metrics.jsonl"
            rows, damage = _read_rows(path)
            if damage:
                storage.set_aside(path, damage)
            lines = "".join(_line(row) for row in rows if row["step"] <= step)
            return storage.GrowingFile(path, lines)

        def open_bar() -> tqdm.tqdm | None:
            if sys.stderr is None or not sys.stderr.isatty():
                return None
            return tqdm.tqdm(
                total=total_steps, initial=step, unit="step", dynamic_ncols=True
            )

        folder = workdir / "tensorboard"
        self._metrics = ByProduct(str(workdir / "metrics.jsonl"), open_metrics)
        self._board = ByProduct(str(folder), lambda: _Board(folder, step))
        self._bar = ByProduct("The progress bar", open_bar)

    def tick(self, step: int) -> None:
        """Moves the progress bar to a step."""
        if self._active:
            self._bar.use(lambda bar: bar.update(step - bar.n))

    def train(self, step: int, values: dict[str, float], eta: float) -> None:
        """Writes the training metrics of the steps since the last call.

        Args:
          step: The last of the steps.
          values: The metrics by name, among them `loss`, `top1`, `epoch`,
            `images_per_second`, `data_wait` (a fraction) and `learning_rate`.
          eta: The estimated time until the end of the run, in seconds.
        """
        if not self._active:
            return
        self._write(step, {f"train/{key}": value for key, value in values.items()})
        short = {
            "loss": f"{values['loss']:.4f}",
            "top1": f"{values['top1']:.4f}",
            "images/s": f"{values['images_per_second']:.0f}",
            "waiting": f"{100 * values['data_wait']:.0f}%",
        }
        if self._bar:
            self._bar.use(lambda bar: bar.set_postfix(short))
            return
        figures = "  ".join(f"{key} {value}" for key, value in short.items())
        say(
            f"step {step}/{self._total}  epoch {values['epoch']:.2f}  {figures}"
            f"  lr {values['learning_rate']:.4g}"
            f"  ETA {tqdm.tqdm.format_interval(eta)}"
        )

    def evaluation(self, step: int, values: dict[str, Any], name: str = "") -> None:
        """Writes the result of an evaluation.

        Args:
          step: The step of the evaluated parameters.
          values: The metrics by name; dictionaries among them are left out.
          name: The name of an extra evaluation set, or '' for the eval split.
        """
        if not self._active:
            return
        prefix = f"eval/{name}" if name else "eval"
        numbers = {key: x for key, x in values.items() if not isinstance(x, dict)}
        self._write(step, {f"{prefix}/{key}": x for key, x in numbers.items()})
        place = f" on {name}" if name else ""
        say(f"step {step}/{self._total}  evaluated{place}: {describe(values)}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = _line({"step": step, **values})
        self._metrics.use(lambda metrics: metrics.add(line))
        self._board.use(lambda board: board.add(step, values))

    def flush(self) -> None:
        """Returns when all rows are on disk; to be called before a checkpoint is saved.

        Rows after the checkpoint may be lost with the process: a run that resumes from
        it writes them again.
        """
        if self._active:
            self._metrics.use(lambda metrics: metrics.flush())

    def close(self) -> None:
        """Closes the files and removes the progress bar."""
        if self._active:
            for product in (self._bar, self._metrics, self._board):
                product.use(lambda used: used.close())

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _line(row: dict[str, Any]) -> str:
    return storage.to_json(row) + "\n"


def describe(values: Mapping[str, Any]) -> str:
    """Returns the result of an evaluation in a few words.

    Args:
      values: The metrics by name: `top1`, `top5`, `loss`, `n_seen` and maybe `mce`. A
        loss that is not finite may be None, as it is read from JSON. The images that
        could not be decoded are `bad_images`, their number or names.
    """
    loss = math.nan if values["loss"] is None else values["loss"]
    mce = f"  mCE {100 * values['mce']:.2f} %" if "mce" in values else ""
    bad = values.get("bad_images") or values.get("bad_eval_images") or 0
    bad = bad if isinstance(bad, int) else len(bad)
    return (
        f"top-1 {100 * values['top1']:.2f} %  top-5 {100 * values['top5']:.2f} %"
        f"  loss {loss:.4f}{mce}  on {values['n_seen']:,} images"
        f"{f' ({bad:,} skipped)' if bad else ''}"
    )
