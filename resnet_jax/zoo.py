"""Prints the table of networks: `python -m resnet_jax.zoo [PATTERN...] [--json]`.

A row has the name, the number of parameters, the MACs (multiply-adds) of a forward pass
of one image of `px` pixels, the memory of its convolutions' outputs in float32, the
published top-1 accuracy (on ImageNet, or on CIFAR-10 for networks of 32 px) and its
source, the reference that `make test-oracles` tests the network against, whether
`scan_blocks` applies, and the paper.
"""

import json

from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.errors import matching


def main(argv: list[str]) -> None:
    """Runs the command, which the module's docstring describes."""
    parser = Parser("zoo", __doc__)
    parser.add_argument(
        "patterns",
        nargs="*",
        default=["*"],
        metavar="PATTERN",
        help="Lists only networks whose names match one of the patterns, such as"
        " 'resnet5*'. The default is '*', all of them.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json",
        action="store_true",
        help="Prints a JSON array of the rows, with counts and bytes as plain numbers,"
        " in place of the table. It is off by default.",
    )
    form.add_argument(
        "--markdown",
        action="store_true",
        help="Prints the table in Markdown, as in docs/networks.md. It is off by"
        " default.",
    )
    args = parser.parse(argv[1:])
    # Imported here, so that --help answers at once.
    from resnet_jax.models import ZOO, table
    from resnet_jax.parallel.sharding import find_devices

    # JAX warns of an accelerator that it does not use at its first call, which is this.
    find_devices()
    rows = table.rows(matching("network", args.patterns, ZOO))
    if args.json:
        output.answer(json.dumps(rows, indent=1))
    else:
        as_table = table.as_markdown if args.markdown else table.as_text
        output.answer(as_table(rows))


if __name__ == "__main__":
    output.command(main)
