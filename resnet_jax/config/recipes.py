"""The table of recipes that `python -m resnet_jax.recipes` prints."""

import runpy
from collections.abc import Iterable, Iterator, Sequence

from resnet_jax.config.files import RECIPES, load
from resnet_jax.errors import matching

COLUMNS = ("recipe", "network", "data", "length", "batch", "published", "reached")


def variants() -> Iterator[tuple[str, str, str]]:
    """Yields the recipes, each with its published and its reached result.

    Yields:
      The name, FILE.py or FILE.py:VARIANT; the published top-1 in %; and the top-1 that
      was reached here. A result is empty if there is none.
    """
    for file in sorted(RECIPES.glob("*.py")):
        module = runpy.run_path(str(file))
        reached = module.get("REACHED", {})
        for variant, published in module.get("PUBLISHED", {"": ""}).items():
            name = f"{file.name}:{variant}" if variant else file.name
            yield name, published, reached.get(variant, "")


def row(name: str, published: str, reached: str) -> tuple[str, ...]:
    """Returns the row of a recipe, a cell for each of `COLUMNS`.

    Args:
      name: FILE.py or FILE.py:VARIANT.
      published: The published result.
      reached: The result that was reached here.
    """
    config = load(RECIPES / name)
    data = config.data
    size = f", {data.image_size or 'any'}"
    if data.eval_size:
        size += f"/{data.eval_size}"
    length = "by the data"
    for unit, amount in config.total.items():
        length = f"{amount:,g} {unit}" if amount < 1e6 else f"{amount:,} {unit}"
    return (
        name,
        config.model.name or "any",
        f"{data.source.partition(':')[2] or data.source}{size} px",
        length,
        f"{config.batch_size:,}",
        published,
        reached,
    )


def table(patterns: Iterable[str] = ("*",)) -> list[tuple[str, ...]]:
    """Returns the rows of the recipes whose names match patterns, in their order.

    Args:
      patterns: Names with wildcards, such as `rsb.py:*`.

    Raises:
      UserError: No recipe has a name that matches one of them.
    """
    recipes = {recipe[0]: recipe for recipe in variants()}
    return [row(*recipes[name]) for name in matching("recipe", patterns, recipes)]


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows in Markdown, as in docs/recipes.md."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows as a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in [COLUMNS, *rows]
    )
