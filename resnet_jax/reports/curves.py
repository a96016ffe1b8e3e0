"""Plots the loss and accuracy of a run with some right and wrong predictions."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from resnet_jax.console import output
from resnet_jax.errors import UserError
from resnet_jax.persistence import storage
from resnet_jax.persistence.metric_writers import describe, points, read_metrics
from resnet_jax.persistence.storage import Path
from resnet_jax.reports.figures import picture, shorten


def draw(workdir: Path, result: dict | None = None) -> Path:
    """Plots loss and accuracy by step, and some right and wrong predictions.

    Args:
      workdir: The directory of the run.
      result: The result of the run, for the title. None takes `result.json`, if there
        is one.

    Returns:
      The path of the picture, `report.png` in the workdir.

    Raises:
      UserError: The workdir holds no metrics, or the picture cannot be written.
    """
    rows = read_metrics(workdir)
    if not rows:
        raise UserError(
            f"{workdir} holds no metrics.jsonl with rows to plot. Give the workdir of a"
            " run."
        )
    path = workdir / "report.png"
    storage.make_way(path)
    with picture(path, figsize=(13, 8)) as figure:
        above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1))
        loss, accuracy = above.subplots(1, 2)
        _curves(loss, rows, "loss", 1.0)
        loss.set(xlabel="step", ylabel="cross entropy (nats)", title="Loss")
        _curves(accuracy, rows, "top1", 100.0)
        accuracy.set(xlabel="step", ylabel="top-1 (%)", title="Accuracy")
        for axes in (loss, accuracy):
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
        _draw_samples(below, workdir / "predictions.npz")
        figure.suptitle(_title(workdir, result))
    return path


def _curves(axes, rows: list[dict], key: str, scale: float) -> None:
    """Plots a metric of both splits by step."""
    for split, style in (("train", "-"), ("eval", "o-")):
        steps_and_values = points(rows, f"{split}/{key}")
        if steps_and_values:
            steps, values = zip(*steps_and_values, strict=True)
            axes.plot(steps, scale * np.array(values), style, label=split, markersize=3)


def _draw_samples(figure, path: Path) -> None:
    """Draws the images of `predictions.npz`; a damaged file is only a warning."""
    if not path.is_file():
        return
    with output.dispensable(str(path), "read"):
        with np.load(io.BytesIO(storage.read(path))) as saved:
            data = dict(saved)
        _draw_images(figure, data)


def _draw_images(figure, data: Mapping[str, np.ndarray]) -> None:
    """Draws images with their predictions, the right ones above the wrong ones."""
    classes = data["classes"]
    grid = figure.subplots(2, 8)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, (right, title) in enumerate(((True, "right"), (False, "wrong"))):
        for axes, i in zip(
            grid[row], np.flatnonzero(data["right"] == right), strict=False
        ):
            axes.imshow(data["image"][i].squeeze(), cmap="gray", vmin=0, vmax=255)
            # A network may have more classes than the data have names.
            predicted, label = (
                shorten(str(classes[n]) if n < len(classes) else f"class {n}", 20)
                for n in (data["predicted"][i], data["label"][i])
            )
            text = f"{predicted} ({data['probability'][i]:.2f})"
            if not right:
                text += f"\nis {label}"
            axes.set_title(text, fontsize=8, color="green" if right else "firebrick")
        grid[row][0].text(
            -0.25,
            0.5,
            title,
            transform=grid[row][0].transAxes,
            rotation=90,
            va="center",
        )


def _title(workdir: Path, result: Mapping[str, Any] | None) -> str:
    """Returns the network and its result, or the name of a workdir without one."""
    path = workdir / "result.json"
    with output.dispensable(str(path), "read"), contextlib.suppress(FileNotFoundError):
        content = storage.read_object(path) if result is None else result
        return f"{content['model']}: {describe(content)}"
    return shorten(workdir.name, 100)
