"""What a run tells: lines or a progress bar, metrics.jsonl, TensorBoard files."""

import io
import json
import logging
import sys
import time

import tqdm
from tensorboardX import record_writer, summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from resnet_jax import storage
from resnet_jax.storage import Path

log = logging.getLogger(__name__)

# Seconds between two writings of TensorBoard's events.
EVERY = 30.0


def write_json(path: Path, content: dict) -> None:
    """Writes a JSON file so that it is there whole or not at all."""
    storage.write(path, json.dumps(content, indent=2) + "\n")


def read_metrics(workdir: Path) -> list[dict]:
    """The rows of `metrics.jsonl`; a last line that was cut off is left out."""
    rows = []
    path = workdir / "metrics.jsonl"
    with storage.telling(workdir):
        lines = storage.read(path).decode().splitlines() if path.exists() else ()
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class _Events:
    """A file of TensorBoard's events in an object store, written anew at each flush."""

    def __init__(self, path: str):
        self._path, self._events = storage.path_of(path), io.BytesIO()

    def write(self, event: bytes) -> None:
        self._events.write(event)

    def flush(self) -> None:
        # They are dispensable; the next flush writes what this one could not.
        try:
            storage.write(self._path, self._events.getvalue())
        except Exception as error:
            log.warning("%s cannot be written: %s", self._path, error)

    def close(self) -> None:
        self.flush()


class _InStore:
    """What tensorboardX asks where paths begin with `gs:` or `s3:`.

    Its own way takes a client of its own, which may have other settings.
    """

    open = _Events

    @staticmethod
    def directory_check(path: str) -> None:
        """There are no directories."""


for _scheme in storage.CLIENTS:
    record_writer.register_writer_factory(_scheme, _InStore)


def say(text: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class _Board:
    """Numbers for TensorBoard, each written by who adds it.

    tensorboardX's own writer has a thread; when that dies, at a full disk, the next
    numbers wait for it for ever.
    """

    def __init__(self, folder: str, step: int):
        """Events of `folder` that come behind `step` are to be forgotten."""
        record_writer.directory_check(folder)
        self._events = EventsWriter(f"{folder}/events")
        self._flushed = time.monotonic()
        if step:
            start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
            self._write(Event(step=step + 1, session_log=start))

    def add(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._write(Event(step=step, summary=summary.scalar(key, value)))
        if time.monotonic() - self._flushed > EVERY:
            self._events.flush()
            self._flushed = time.monotonic()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write_event(event)

    def close(self) -> None:
        try:
            self._events.close()
        except OSError as error:
            # What ends the run is told, and metrics.jsonl has the numbers too.
            log.warning("TensorBoard's last numbers are not written: %s", error)


class Writer:
    """Tells how a run goes; one process of a run has an active one.

    Args:
      workdir: where the files go.
      step: where the run stands; rows of later steps, from before a restart, go.
      total_steps: where it ends.
      active: whether this process writes at all.
    """

    def __init__(self, workdir: Path, *, step: int, total_steps: int, active: bool):
        self._active = active
        self._total = total_steps
        self._bar = None
        if not active:
            return
        rows = [row for row in read_metrics(workdir) if row["step"] <= step]
        self._metrics = storage.Lines(
            workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        )
        self._board = _Board(str(workdir / "tensorboard"), step)
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                total=total_steps, initial=step, unit="step", dynamic_ncols=True
            )

    def tick(self, step: int) -> None:
        """Moves the progress bar."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

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
        if self._bar is not None:
            self._bar.set_postfix(short)
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
        self._metrics.add(json.dumps({"step": step, **values}) + "\n")
        self._board.add(step, values)

    def flush(self) -> None:
        """Returns when all rows are written; called before a checkpoint of their step.

        Those behind it may be lost with the process: it makes them again.
        """
        if self._active:
            self._metrics.flush()

    def close(self) -> None:
        """Finishes the files; the bar goes."""
        if self._bar is not None:
            self._bar.close()
        if self._active:
            self._metrics.close()
            self._board.close()

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
