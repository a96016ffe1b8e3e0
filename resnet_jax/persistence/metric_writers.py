"""What a run tells: lines or a progress bar, metrics.jsonl, TensorBoard files."""

import json
import socket
import struct
import sys
import time

import tqdm
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from resnet_jax.console.output import ByProduct, reason_of, say
from resnet_jax.errors import UserError
from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import Path


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file so that it is there whole or not at all."""
    storage.write(path, json.dumps(content, indent=2) + "\n")


def read_metrics(workdir: Path) -> list[dict]:
    """Returns the rows of `metrics.jsonl` up to a line that was cut off.

    Raises UserError if the file cannot be read.
    """
    rows = []
    path = workdir / "metrics.jsonl"
    try:
        with storage.telling(workdir):
            # A pipe of this name would be waited for.
            lines = storage.read(path).splitlines() if path.is_file() else ()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}.") from None
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or "step" not in row:
            break
        rows.append(row)
    return rows


class _Board:
    """Scalars for TensorBoard, as a file of events.

    tensorboardX's own writer has a thread. When a full disk ends it, the next scalars
    wait for it for ever.
    """

    def __init__(self, folder: Path, step: int):
        """Starts a file; TensorBoard discards events of other files after `step`."""
        storage.make_directory(folder)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._file = storage.GrowingFile(folder / name, every=30.0)
        self._write(Event(file_version="brain.Event:2"))
        if step:
            start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
            self._write(Event(step=step + 1, session_log=start))

    def add(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars of a step."""
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
        """Finishes the file."""
        self._file.close()


def _record(data: bytes) -> bytes:
    """Frames an event as TensorFlow's record files do: length, data, checksums."""
    length = struct.pack("<Q", len(data))
    checksums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return b"".join((length, next(checksums), data, next(checksums)))


class Writer:
    """Reports the progress of a run; one process of a run has an active one.

    The files and the bar are by-products: none of them can end the run.

    Args:
      workdir: The directory of the run.
      step: The step at which the run starts; rows of later steps, which an interrupted
        process left behind, are dropped.
      total_steps: The step at which the run ends.
      active: Whether this process writes at all.
    """

    def __init__(self, workdir: Path, *, step: int, total_steps: int, active: bool):
        self._active = active
        self._total = total_steps
        if not active:
            return

        def open_metrics() -> storage.GrowingFile:
            rows = [row for row in read_metrics(workdir) if row["step"] <= step]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            return storage.GrowingFile(workdir / "metrics.jsonl", lines)

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
        """Moves the progress bar."""
        if self._active:
            self._bar.use(lambda bar: bar.update(step - bar.n))

    def train(self, step: int, values: dict[str, float], eta: float) -> None:
        """Writes the figures of the steps since the last call; `eta` in seconds."""
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

    def evaluation(self, step: int, values: dict, name: str = "") -> None:
        """Writes the result of an evaluation, of the set `name` if it has one."""
        if not self._active:
            return
        prefix = f"eval/{name}" if name else "eval"
        numbers = {key: x for key, x in values.items() if not isinstance(x, dict)}
        self._write(step, {f"{prefix}/{key}": x for key, x in numbers.items()})
        on = f" on {name}" if name else ""
        say(f"step {step}/{self._total}  evaluated{on}: {describe(values)}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = json.dumps({"step": step, **values}) + "\n"
        self._metrics.use(lambda metrics: metrics.add(line))
        self._board.use(lambda board: board.add(step, values))

    def flush(self) -> None:
        """Returns when all rows are written; called before a checkpoint of their step.

        Those behind it may be lost with the process: it makes them again.
        """
        if self._active:
            self._metrics.use(lambda metrics: metrics.flush())

    def close(self) -> None:
        """Finishes the files and removes the bar."""
        if self._active:
            for product in (self._bar, self._metrics, self._board):
                product.use(lambda used: used.close())

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def describe(values: dict) -> str:
    """An evaluation in a few words."""
    mce = f"  mCE {100 * values['mce']:.2f} %" if "mce" in values else ""
    return (
        f"top-1 {100 * values['top1']:.2f} %  top-5 {100 * values['top5']:.2f} %"
        f"  loss {values['loss']:.4f}{mce}  on {values['n_seen']:,} images"
    )
