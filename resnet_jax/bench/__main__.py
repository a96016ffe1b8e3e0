"""The command; see the package's docstring."""

import argparse
import pathlib
import pkgutil
import shlex
import signal
import sys
from collections.abc import Sequence
from typing import Any

from resnet_jax import bench
from resnet_jax.bench import table
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count
from resnet_jax.errors import check_known
from resnet_jax.parallel import process_memory

# The names of objects, of which only the one that is asked for is imported: `gpu` runs
# where packages are missing that others need.
TABLES = {
    "step": "resnet_jax.bench.baseline:STEP",
    "inference": "resnet_jax.bench.baseline:INFERENCE",
    "input": "resnet_jax.bench.input:BENCHMARK",
    "compile": "resnet_jax.bench.compile:BENCHMARK",
    "overhead": "resnet_jax.bench.overhead:BENCHMARK",
    "scale": "resnet_jax.bench.scale:BENCHMARK",
    "convolutions": "resnet_jax.bench.convolutions:BENCHMARK",
}
# What `all` runs, and what it can be told of these.
ALL = ("step", "inference", "input", "compile", "overhead")
SHARED = ("repeats", "torch", "images")
PICTURES = {
    "augment": "resnet_jax.bench.augment",
    "schedule": "resnet_jax.bench.schedule",
}
CHECKS = {"gpu": "resnet_jax.bench.gpu"}
WHATS = (*TABLES, "all", *PICTURES, *CHECKS)


def imported(what: str) -> Any:
    """Imports what makes a table, a picture or a check."""
    return pkgutil.resolve_name((TABLES | PICTURES | CHECKS)[what])


def make_parser(what: str) -> Parser:
    """Makes the parser of `bench WHAT`.

    Args:
      what: A name of `WHATS`, the only one whose module is imported; or '' for the
        parser of `bench` alone.
    """
    if not what:
        parser = Parser("bench", bench.__doc__)
        parser.add_argument(
            "what",
            metavar="WHAT",
            help=f"What is measured or plotted: {', '.join(WHATS)}. `python -m"
            " resnet_jax.bench WHAT --help` lists its flags.",
        )
        return parser
    parser = Parser(f"bench {what}", None)
    if what in TABLES or what == "all":
        add_common(parser)
    if what == "all":
        parser.description = "The tables " + ", ".join(ALL) + ", one after the other."
        table.add_torch(parser)
        pkgutil.resolve_name("resnet_jax.bench.input").add_images(parser)
    else:
        module = (TABLES | PICTURES | CHECKS)[what].partition(":")[0]
        # What follows is for readers of the code.
        parser.description = pkgutil.resolve_name(module).__doc__.splitlines()[0]
        imported(what).add_arguments(parser)
    return parser


def add_common(parser: Parser) -> None:
    """Adds the arguments of every table."""
    parser.add_argument(
        "--repeats",
        type=count,
        default=3,
        help="The number of times that everything is measured. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        metavar="FILE",
        help="The file in which the tables are kept as JSON. Without it, they are only"
        " printed.",
    )


def part_of_all(name: str, given: argparse.Namespace) -> list[str]:
    """The command with which `all` makes a table."""
    default = make_parser(name).parse([])
    shared = [key for key in SHARED if key in default]
    changed = [k for k in shared if getattr(given, k) != getattr(default, k)]
    return [name, *(f"--{key}={getattr(given, key)}" for key in changed)]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses a command line, without the program's name; adds `what` to its flags."""
    what = argv[0] if argv else ""
    if what.startswith("-") or not what:
        make_parser("").parse(argv)
    check_known(f"benchmark {what!r}", what, WHATS)
    args = make_parser(what).parse(argv[1:])
    args.what = what
    return args


def main(argv: list[str]) -> None:
    """Runs the command; see the package's docstring."""
    args = parse(argv[1:])
    if args.what in PICTURES | CHECKS:
        imported(args.what).run(args)
        return
    report = table.Report(args.json)
    commands = [argv[1:]]
    if args.what == "all":
        commands = [part_of_all(name, args) for name in ALL]
    for command in commands:
        args = parse(command)
        benchmark = imported(args.what)
        python = getattr(args, "torch", sys.executable)
        where = table.machine(benchmark.packages, benchmark.peers, python)
        told = "python -m resnet_jax.bench " + shlex.join(command)
        report.add(told, where, benchmark.rows(args))


if __name__ == "__main__":
    # Of this process alone, which others that call `main` would not expect.
    if sys.argv[1:2] == ["convolutions"]:
        process_memory.keep_freed_memory()
    # So that what a benchmark started ends with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    output.command(main)
