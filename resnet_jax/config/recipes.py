"""The table of recipes that `python -m resnet_jax.recipes` prints."""

import fnmatch
import runpy
from collections.abc import Iterator, Sequence

from resnet_jax.config.files import RECIPES, load
from resnet_jax.errors import UserError

COLUMNS = ("recipe", "network", "data", "length", "batch", "published", "reached")


def variants() -> Iterator[tuple[str, str, str]]:
    """Yields FILE.py or FILE.py:VARIANT, what was published, and what was reached."""
    for file in sorted(RECIPES.glob("*.py")):
        module = runpy.run_path(str(file))
        reached = module.get("REACHED", {})
        for variant, published in module.get("PUBLISHED", {"": ""}).items():
            name = f"{file.name}:{variant}" if variant else file.name
            yield name, published, reached.get(variant, "")


def row(name: str, published: str, reached: str) -> tuple[str, ...]:
    """Returns one line of the table."""
    config = load(RECIPES / name)
    ((unit, amount),) = config.total.items()
    data = config.data
    size = f"{data.image_size}"
    if data.eval_size:
        size += f"/{data.eval_size}"
    return (
        name,
        config.model.name,
        f"{data.source.partition(':')[2] or data.source}, {size} px",
        f"{amount:,g} {unit}" if amount < 1e6 else f"{amount:,} {unit}",
        f"{config.batch_size:,}",
        published,
        reached,
    )


def table(pattern: str = "*") -> list[tuple[str, ...]]:
    """Returns the lines of the table; raises UserError if no recipe has such a name."""
    rows = [
        row(*recipe) for recipe in variants() if fnmatch.fnmatch(recipe[0], pattern)
    ]
    if not rows:
        raise UserError(
            f"No recipe is called {pattern!r}; without a name, all are listed."
        )
    return rows


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Formats the table as configs/README.md has it."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Formats the table for a terminal."""
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in [COLUMNS, *rows]
    )
