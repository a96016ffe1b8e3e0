"""The table of networks that `python -m resnet_jax.zoo` prints."""

from collections.abc import Iterable
from typing import Any

from resnet_jax.models import ZOO, build
from resnet_jax.models.cost import cost_of_image
from resnet_jax.models.scan import applies


def rows(names: Iterable[str]) -> list[dict[str, Any]]:
    """Returns the figures of networks, one dictionary each.

    `params` and `macs` are numbers, `activation_bytes` is for float32, `image_size` is
    the side in pixels that both are for, and `top1` is in percent.
    """
    return [_row(name) for name in names]


def _row(name: str) -> dict[str, Any]:
    entry = ZOO[name]
    # Scanned blocks are traced once, which takes a deep network a moment.
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
    *("name", "params M", "px", "GMACs", "activations MB", "top-1 %", "source"),
    *("oracle", "scan", "paper"),
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Formats a row for the table; see `HEADER`."""
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
    """Formats the table for a terminal."""
    lines = [HEADER, *map(cells, table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # Numbers are aligned to the right, words to the left.
    sides = "<>>>>><<<<"
    return "\n".join(
        "  ".join(
            f"{cell:{side}{width}}"
            for cell, side, width in zip(line, sides, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def as_markdown(table: list[dict]) -> str:
    """Formats the table in Markdown, as in docs/networks.md."""
    lines = [HEADER, ("---",) * len(HEADER), *map(cells, table)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
