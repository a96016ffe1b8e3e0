"""Prints the tables of files that `--json=FILE` has written, without measuring."""

import argparse
import json
import pathlib
import re
import textwrap

from resnet_jax.bench import table
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.errors import UserError
from resnet_jax.paths import local


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench show`."""
    parser.add_argument(
        "files",
        nargs="+",
        type=local,
        metavar="FILE",
        help="The files, which are printed in this order.",
    )
    parser.add_argument(
        "--rows",
        type=_pattern,
        metavar="REGEX",
        help="Prints one table of the rows whose measurement and baseline, with ' | '"
        " between them, match this regular expression. Without it, each table is"
        " printed whole, with its command.",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the tables."""
    tables = [measured for path in args.files for measured in read(path)]
    if not args.rows:
        output.answer("\n\n".join(map(as_section, tables)))
        return
    lines = []
    for measured in tables:
        for row in measured["rows"]:
            if args.rows.search(f"{row['name']} | {row['peer']}"):
                lines.append(table.as_markdown(row))
    if not lines:
        raise UserError(f"No row matches --rows={args.rows.pattern}.")
    output.answer("\n".join([table.HEAD, *lines]))


def read(path: pathlib.Path) -> list[dict]:
    """Reads a file that a benchmark has written.

    Args:
      path: The path of the file.

    Returns:
      The tables, as `table.Report` collects them.

    Raises:
      UserError: There is no such file, or it has other contents.
    """
    try:
        tables = json.loads(path.read_text())
        for measured in tables:
            as_section(measured)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}.") from None
    except (ValueError, TypeError, LookupError):
        raise UserError(
            f"{path} is not a file that python -m resnet_jax.bench WHAT --json=FILE"
            " has written."
        ) from None
    return tables


def as_section(measured: dict) -> str:
    """Formats a table of `table.Report`: its command, its machine and its rows."""
    parts = textwrap.wrap(
        measured["command"], 80, break_long_words=False, break_on_hyphens=False
    )
    command = " \\\n    ".join(parts)
    lines = [f"```bash\n{command}\n```", "", table.describe(measured), ""]
    return "\n".join([*lines, table.HEAD, *map(table.as_markdown, measured["rows"])])


def _pattern(text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular expression: {error}"
        ) from None
