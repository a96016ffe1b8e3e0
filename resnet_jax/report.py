"""Plots the curves and sample predictions of a run.

`python -m resnet_jax.report WORKDIR` writes WORKDIR/report.png.
"""

from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.persistence import storage


def main(argv: list[str]) -> None:
    """Runs the command, which the module's docstring describes."""
    parser = Parser("report", __doc__)
    parser.add_argument(
        "workdir",
        metavar="WORKDIR",
        type=storage.path_of,
        help="The directory of the run, which holds its metrics.jsonl.",
    )
    args = parser.parse(argv[1:])
    # Imported here, so that --help answers at once.
    from resnet_jax.reports.curves import draw

    output.say(str(draw(args.workdir)))


if __name__ == "__main__":
    output.command(main)
