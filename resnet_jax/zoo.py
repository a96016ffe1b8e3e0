"""Prints the table of networks: `python -m resnet_jax.zoo [PATTERN] [--json]`.

A row has the name, parameters, multiply-adds of a forward pass at `px` pixels, memory
of the convolutions' outputs of one image in float32, the published top-1 accuracy (on
ImageNet, or on CIFAR-10 for networks of 32 px), what `make test-oracles` holds the
network against, whether `scan_blocks` applies, and the paper.
"""

import argparse
import json
from collections.abc import Iterable

from resnet_jax import output
from resnet_jax.errors import UserError, nearest
from resnet_jax.models import ZOO, build, list_models
from resnet_jax.models.cost import cost_of_image
from resnet_jax.models.scan import applies


def rows(names: Iterable[str]) -> list[dict]:
    """The figures of networks, in units of one."""
    return [_row(name) for name in names]


def _row(name: str) -> dict:
    entry = ZOO[name]
    # Scanned, a deep network is traced in a moment.
    model = build(entry.spec, scan_blocks=True)
    cost = cost_of_image(model, entry.image_size)
    return {
        "name": name,
        "params": entry.params,
        "image_size": entry.image_size,
        "macs": cost.macs,
        "activation_bytes": 4 * cost.activations,
        "top1": entry.top1,
        "top1_source": entry.top1_source,
        "oracle": entry.oracle,
        "scan": applies(entry.spec),
        "paper": entry.paper,
    }


HEADER = (
    *("name", "params M", "px", "GMACs", "activations MB", "top-1 %", "of"),
    *("oracle", "scan", "paper"),
)


def cells(row: dict) -> tuple[str, ...]:
    """A row as it is printed; see `HEADER`."""
    return (
        row["name"],
        f"{row['params'] / 1e6:.2f}",
        str(row["image_size"]),
        f"{row['macs'] / 1e9:.3f}",
        f"{row['activation_bytes'] / 1e6:.1f}",
        "" if row["top1"] is None else f"{row['top1']:.2f}",
        row["top1_source"],
        row["oracle"],
        "yes" if row["scan"] else "no",
        row["paper"],
    )


def as_text(table: list[dict]) -> str:
    """The table for a terminal."""
    lines = [HEADER, *map(cells, table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # Numbers stand to the right, words to the left.
    sides = "<>>>>><<<<"
    return "\n".join(
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(line, sides, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def as_markdown(table: list[dict]) -> str:
    """The table for the README."""
    lines = [HEADER, ("---",) * len(HEADER), *map(cells, table)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(argv: list[str]) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m resnet_jax.zoo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pattern", nargs="?", default="*", help="such as 'resnet5*'")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON array of the rows")
    form.add_argument("--markdown", action="store_true", help="the README's table")
    args = parser.parse_args(argv[1:])
    names = list_models(args.pattern)
    if not names:
        hint = nearest(args.pattern, ZOO) if "*" not in args.pattern else ""
        raise UserError(f"No network matches {args.pattern!r}.{hint}")
    table = rows(names)
    if args.json:
        output.answer(json.dumps(table, indent=1))
    else:
        output.answer((as_markdown if args.markdown else as_text)(table))


if __name__ == "__main__":
    output.command(main)
