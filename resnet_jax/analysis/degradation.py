"""Plots training and evaluation errors of several runs, as He et al. 2015, figure 6.

python -m resnet_jax.analysis.degradation --runs=DIR,DIR,... --save=errors.png

Deeper plain networks have a higher training error than shallower ones. This degradation
does not occur in residual networks (arXiv:1512.03385, section 4.2). Dashed lines are
errors on training batches during training, bold lines are errors on the eval split.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.errors import UserError
from resnet_jax.persistence import storage
from resnet_jax.persistence.metric_writers import points, read_metrics
from resnet_jax.persistence.storage import Path
from resnet_jax.reports.figures import picture, picture_to_write, shorten

# The splits, and the style of their lines.
SPLITS: dict[str, dict[str, Any]] = {
    "train": {"linestyle": "--", "linewidth": 0.8},
    "eval": {"linewidth": 2},
}


def errors(workdir: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the errors of a run.

    Args:
      workdir: The run's directory.

    Returns:
      Pairs (step, error in %) for each split, `train` and `eval`. A training error is
      the mean over the steps since the previous pair, on augmented images.

    Raises:
      UserError: The workdir holds no metrics.
    """
    rows = read_metrics(workdir)
    if not rows:
        raise UserError(f"{workdir} holds no metrics.jsonl; --runs takes workdirs.")
    return {
        split: [
            (step, 100 * (1 - top1)) for step, top1 in points(rows, f"{split}/top1")
        ]
        for split in SPLITS
    }


def name_of(workdir: Path) -> str:
    """Returns the name of the network that a run trains, with the workdir's name."""
    path = workdir / "config.json"
    with output.dispensable(str(path), "read"), contextlib.suppress(FileNotFoundError):
        return f"{storage.read_object(path)['model']['name']} ({workdir.name})"
    return workdir.name


def plot(workdirs: Sequence[Path], path: Path) -> Path:
    """Plots the errors of runs by step, in a colour for each run.

    Args:
      workdirs: The directories of the runs.
      path: The picture's file.

    Returns:
      The picture's file.

    Raises:
      UserError: A workdir holds no metrics.
    """
    with picture(path, figsize=(8, 5.5)) as figure:
        axes = figure.subplots()
        for number, workdir in enumerate(workdirs):
            # The space is for names that begin with an underscore, which matplotlib
            # leaves out of legends.
            name = f" {shorten(name_of(workdir), 60)}"
            for split, points in errors(workdir).items():
                label = name if split == "eval" else None
                style = SPLITS[split] | {"color": f"C{number}", "label": label}
                # A line through a single point is invisible.
                marker = "o" if len(points) == 1 else None
                axes.plot(*zip(*points, strict=True), **style, marker=marker)
        title = "Error: dashed in training, bold in evaluation"
        axes.set(xlabel="step", ylabel="error (%)", title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    return path


def main(argv: list[str]) -> None:
    """Runs the command; see the module's docstring."""
    parser = Parser("analysis.degradation", __doc__)
    parser.add_argument(
        "--runs",
        required=True,
        help="The directories of the runs, separated by commas.",
    )
    parser.add_argument(
        "--save",
        type=picture_to_write,
        required=True,
        help="The file to which the picture is written, such as errors.png.",
    )
    args = parser.parse(argv[1:])
    workdirs = [storage.path_of(run) for run in args.runs.split(",")]
    for workdir in workdirs:
        last = {split: points[-1:] for split, points in errors(workdir).items()}
        parts = [
            f"{split} error {error:.2f} % at step {step}"
            for split, points in last.items()
            for step, error in points
        ]
        output.say(f"{name_of(workdir)}: {', '.join(parts)}")
    output.say(str(plot(workdirs, args.save)))


if __name__ == "__main__":
    output.command(main)
