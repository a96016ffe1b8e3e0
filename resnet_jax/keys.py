"""Lists the keys of a config with their types, defaults and meanings.

python -m resnet_jax.keys [PATTERN...] [--markdown]

A key comes with its default, as both are written after `--config.` on a command line,
and with its type. "Only with" lists the optimisers, schedules, crops or losses that
read the key, or the keys without which it has no effect.
"""

from resnet_jax.config import keys
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser


def main(argv: list[str]) -> None:
    """Runs the command, which the module's docstring describes."""
    parser = Parser("keys", __doc__)
    parser.add_argument(
        "patterns",
        nargs="*",
        default=["*"],
        metavar="PATTERN",
        help="Lists only keys that match one of the patterns, such as 'optim.*'. The"
        " default is '*', all of them.",
    )
    parser.add_argument(
        "--markdown",
        action="store_true",
        help="Prints the table in Markdown, as in docs/config.md. It is off by"
        " default.",
    )
    args = parser.parse(argv[1:])
    rows = keys.table(args.patterns)
    if args.markdown:
        output.answer(keys.as_markdown(rows).rstrip())
    else:
        output.answer(keys.as_text(rows))


if __name__ == "__main__":
    output.command(main)
