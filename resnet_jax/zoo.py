"""Prints the table of networks: `python -m resnet_jax.zoo [PATTERN] [--json]`.

A row has the name, parameters, multiply-adds of a forward pass at `px` pixels, memory
of the convolutions' outputs of one image in float32, the published top-1 accuracy (on
ImageNet, or on CIFAR-10 for networks of 32 px), what `make test-oracles` tests the
network against, whether `scan_blocks` applies, and the paper.
"""

import json

from resnet_jax.console import output
from resnet_jax.console.arguments import Parser


def main(argv: list[str]) -> None:
    """Runs the command; see the module's docstring."""
    parser = Parser("zoo", __doc__)
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        metavar="PATTERN",
        help="Lists only networks whose names match, such as 'resnet5*'. The default"
        " is '*', all of them.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json",
        action="store_true",
        help="Prints a JSON array of the rows, in units of one, in place of the table.",
    )
    form.add_argument(
        "--markdown",
        action="store_true",
        help="Prints the table in Markdown, as the README has it.",
    )
    args = parser.parse(argv[1:])
    # Imported here, so that --help answers at once.
    from resnet_jax.models import table
    from resnet_jax.parallel.sharding import find_devices

    # JAX's first call, which warns of an accelerator that is not used.
    find_devices()
    found = table.rows(table.matching(args.pattern))
    if args.json:
        output.answer(json.dumps(found, indent=1))
    else:
        as_table = table.as_markdown if args.markdown else table.as_text
        output.answer(as_table(found))


if __name__ == "__main__":
    output.command(main)
