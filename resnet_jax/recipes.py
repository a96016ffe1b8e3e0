"""Lists the recipes of configs/ with their networks, data and published results.

python -m resnet_jax.recipes [PATTERN...] [--markdown]

A config file may define two dictionaries from variants ("" for a file without variants)
to top-1 accuracies in %: `PUBLISHED`, the published ones, and `REACHED`, those that
this project has reached.
"""

from resnet_jax.config import recipes
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser


def main(argv: list[str]) -> None:
    """Runs the command, which the module's docstring describes."""
    parser = Parser("recipes", __doc__)
    parser.add_argument(
        "patterns",
        nargs="*",
        default=["*"],
        metavar="PATTERN",
        help="Lists only recipes whose names match one of the patterns, such as"
        " 'r50*'. The default is '*', all of them.",
    )
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="Prints the table in Markdown, as in docs/recipes.md. It is off by"
        " default.",
    )
    args = parser.parse(argv[1:])
    rows = recipes.table(args.patterns)
    if args.markdown:
        output.answer(recipes.as_markdown(rows).rstrip())
    else:
        output.answer(recipes.as_text(rows))


if __name__ == "__main__":
    output.command(main)
