"""Lists the recipes of configs/: what they train, and what was published.

python -m resnet_jax.recipes [PATTERN] [--markdown]

A config file may have `PUBLISHED`, the published top-1 in % by variant (its argument,
or "" where it takes none), and `REACHED`, what this project reached.
"""

import argparse
import fnmatch
import runpy
from collections.abc import Iterator, Sequence

from resnet_jax import output
from resnet_jax.config import RECIPES, load
from resnet_jax.errors import UserError

COLUMNS = ("recipe", "network", "data", "length", "batch", "published", "reached")


def variants() -> Iterator[tuple[str, str, str]]:
    """All recipes: FILE.py or FILE.py:VARIANT, what was published, and reached."""
    for file in sorted(RECIPES.glob("*.py")):
        module = runpy.run_path(str(file))
        reached = module.get("REACHED", {})
        for variant, published in module.get("PUBLISHED", {"": ""}).items():
            name = f"{file.name}:{variant}" if variant else file.name
            yield name, published, reached.get(variant, "")


def row(name: str, published: str, reached: str) -> tuple[str, ...]:
    """One line of the table."""
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
    """The table's lines; raises UserError if no recipe has such a name."""
    rows = [
        row(*recipe) for recipe in variants() if fnmatch.fnmatch(recipe[0], pattern)
    ]
    if not rows:
        raise UserError(
            f"No recipe is called {pattern!r}; without a name, all are told."
        )
    return rows


def as_markdown(rows: Sequence[Sequence[str]]) -> str:
    """The table as configs/README.md has it."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: list[str]) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m resnet_jax.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pattern", nargs="?", default="*")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(argv[1:])
    rows = table(args.pattern)
    if args.markdown:
        output.answer(as_markdown(rows).rstrip())
        return
    widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
    for line in [COLUMNS, *rows]:
        cells = zip(line, widths, strict=True)
        output.answer("  ".join(cell.ljust(width) for cell, width in cells).rstrip())


if __name__ == "__main__":
    output.command(main)
