"""What a run tells: lines or a progress bar, metrics.jsonl, TensorBoard files."""

import json
import os
import pathlib
import sys

import tensorboardX
import tqdm


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes a JSON file so that it is there whole or not at all."""
    _replace(path, json.dumps(content, indent=2) + "\n")


def _replace(path: pathlib.Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    """The rows of `metrics.jsonl`; a last line that was cut off is left out."""
    rows = []
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def say(text: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    tqdm.tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class Writer:
    """Tells how a run goes; one process of a run has an active one.

    Args:
      workdir: where the files go.
      step: where the run stands; rows of later steps, from before a restart, go.
      total_steps: where it ends.
      active: whether this process writes at all.
    """

    def __init__(
        self, workdir: pathlib.Path, *, step: int, total_steps: int, active: bool
    ):
        self._active = active
        self._total = total_steps
        self._bar = None
        if not active:
            return
        rows = [row for row in read_metrics(workdir) if row["step"] <= step]
        path = workdir / "metrics.jsonl"
        _replace(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._metrics = path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1 if step else None
        )
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
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        for key, value in values.items():
            self._board.add_scalar(key, value, step)

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
