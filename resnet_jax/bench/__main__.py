"""The command; see the package's docstring."""

import argparse
import pathlib
import pkgutil
import shlex
import signal
import sys
from typing import Any

from resnet_jax import bench, host, output
from resnet_jax.arguments import count
from resnet_jax.bench import table

# The names of objects, of which only the one that is asked for is imported: `gpu` runs
# where packages are missing that others need.
TABLES = {
    "step": "resnet_jax.bench.contender:STEP",
    "inference": "resnet_jax.bench.contender:INFERENCE",
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


def imported(what: str) -> Any:
    """Imports what makes a table, a picture or a check."""
    return pkgutil.resolve_name((TABLES | PICTURES | CHECKS)[what])


def make_parser(what: str) -> argparse.ArgumentParser:
    """Makes the parser of the command line.

    Args:
      what: The WHAT whose arguments are known to the parser; the others have none.
    """
    parser = argparse.ArgumentParser(
        prog="python -m resnet_jax.bench",
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name in (*TABLES, "all", *PICTURES, *CHECKS):
        kind = kinds.add_parser(name)
        if name != what:
            continue
        if name in TABLES or name == "all":
            add_common(kind)
        if name == "all":
            table.add_torch(kind)
            pkgutil.resolve_name("resnet_jax.bench.input").add_images(kind)
        else:
            imported(name).add_arguments(kind)
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of every table."""
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="keeps them there"
    )


def part_of_all(name: str, given: argparse.Namespace) -> list[str]:
    """The command with which `all` makes a table."""
    default = make_parser(name).parse_args([name])
    shared = [key for key in SHARED if key in default]
    changed = [k for k in shared if getattr(given, k) != getattr(default, k)]
    return [name, *(f"--{key}={getattr(given, key)}" for key in changed)]


def main(argv: list[str]) -> None:
    """Command line: see the package's docstring."""
    parser = make_parser("".join(argv[1:2]))
    args, overrides = parser.parse_known_args(argv[1:])
    if args.what in PICTURES:
        imported(args.what).run(args, overrides)
        return
    if overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if args.what in CHECKS:
        imported(args.what).run(args)
        return
    report = table.Report(args.json)
    commands = [argv[1:]]
    if args.what == "all":
        commands = [part_of_all(name, args) for name in ALL]
    for command in commands:
        args = make_parser(command[0]).parse_args(command)
        benchmark = imported(args.what)
        python = getattr(args, "torch", sys.executable)
        where = table.machine(benchmark.packages, benchmark.peers, python)
        told = "python -m resnet_jax.bench " + shlex.join(command)
        report.add(told, where, benchmark.rows(args))


if __name__ == "__main__":
    # Of this process alone, which others that call `main` would not expect.
    if sys.argv[1:2] == ["convolutions"]:
        host.keep_freed_memory()
    # So that what a benchmark started ends with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    output.command(main)
