"""Training and test error of several runs, as He et al. 2015 draw them in figure 6.

python -m resnet_jax.analysis.degradation --runs=DIR,DIR,... --save=errors.png

Deeper plain networks have a higher training error than shallower ones: the degradation,
which residual networks do not have (arXiv:1512.03385, section 4.2). Dashed lines are
errors on what was trained on, as it went, and bold lines errors on the test split.
"""

import json
from collections.abc import Sequence

from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.errors import UserError
from resnet_jax.persistence import storage
from resnet_jax.persistence.metric_writers import read_metrics
from resnet_jax.persistence.storage import Path
from resnet_jax.reports.figures import picture, shorten

SPLITS = {"train": {"linestyle": "--", "linewidth": 0.8}, "eval": {"linewidth": 2}}


def errors(workdir: Path) -> dict[str, list[tuple[int, float]]]:
    """The errors of a run: of `train` and `eval`, pairs (step, error in %).

    A training error is the mean over the steps since the one before it, of images as
    they were augmented.

    Raises UserError if the workdir holds no metrics.
    """
    rows = read_metrics(workdir)
    if not rows:
        raise UserError(f"{workdir} holds no metrics.jsonl; --runs takes workdirs.")
    return {
        split: [
            (row["step"], 100 * (1 - row[f"{split}/top1"]))
            for row in rows
            if f"{split}/top1" in row
        ]
        for split in SPLITS
    }


def name_of(workdir: Path) -> str:
    """The network that a run trains, and the workdir's own name."""
    config = workdir / "config.json"
    if not config.exists():
        return workdir.name
    return f"{json.loads(config.read_text())['model']['name']} ({workdir.name})"


def draw(workdirs: Sequence[Path], path: Path) -> Path:
    """Draws the errors of runs by step, a colour a run."""
    with picture(path, figsize=(8, 5.5)) as figure:
        axes = figure.subplots()
        for number, workdir in enumerate(workdirs):
            # Legends leave out labels that begin with an underscore.
            name = f" {shorten(name_of(workdir), 60)}"
            for split, points in errors(workdir).items():
                label = name if split == "eval" else None
                style = SPLITS[split] | {"color": f"C{number}", "label": label}
                # A single point would be no line.
                marker = "o" if len(points) == 1 else None
                axes.plot(*zip(*points, strict=True), **style, marker=marker)
        title = "Error: dashed in training, bold in the test"
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
        help="The workdirs of the runs, with commas between them.",
    )
    parser.add_argument(
        "--save",
        type=storage.path_of,
        required=True,
        help="The picture that is written, such as errors.png.",
    )
    args = parser.parse(argv[1:])
    workdirs = [storage.path_of(run) for run in args.runs.split(",")]
    for workdir in workdirs:
        last = {split: points[-1:] for split, points in errors(workdir).items()}
        told = [
            f"{split} error {error:.2f} % at step {step}"
            for split, points in last.items()
            for step, error in points
        ]
        output.say(f"{name_of(workdir)}: {', '.join(told)}")
    output.say(str(draw(workdirs, args.save)))


if __name__ == "__main__":
    output.command(main)
