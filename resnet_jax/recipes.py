"""Lists the recipes of configs/: what they train, and what was published.

python -m resnet_jax.recipes [PATTERN] [--markdown]

A config file may have `PUBLISHED`, the published top-1 in % by variant (its argument,
or "" where it takes none), and `REACHED`, what this project reached.
"""

from resnet_jax.config import recipes
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser


def main(argv: list[str]) -> None:
    """Runs the command; see the module's docstring."""
    parser = Parser("recipes", __doc__)
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        metavar="PATTERN",
        help="Lists only recipes whose names match, such as 'r50*'. The default is"
        " '*', all of them.",
    )
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="Prints the table in Markdown, as configs/README.md has it.",
    )
    args = parser.parse(argv[1:])
    rows = recipes.table(args.pattern)
    if args.markdown:
        output.answer(recipes.as_markdown(rows).rstrip())
    else:
        output.answer(recipes.as_text(rows))


if __name__ == "__main__":
    output.command(main)
