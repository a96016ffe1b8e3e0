"""The command; see the package's docstring."""

import argparse
import pathlib
import shlex
import signal
import sys

from resnet_jax import bench, host, output
from resnet_jax.arguments import count
from resnet_jax.bench import (
    augment,
    compile,
    contender,
    convolutions,
    input,
    overhead,
    scale,
    schedule,
    table,
)

TABLES = {
    "step": contender.STEP,
    "inference": contender.INFERENCE,
    "input": input.BENCHMARK,
    "compile": compile.BENCHMARK,
    "overhead": overhead.BENCHMARK,
    "scale": scale.BENCHMARK,
    "convolutions": convolutions.BENCHMARK,
}
# What `all` runs, and what it can be told of these.
ALL = ("step", "inference", "input", "compile", "overhead")
SHARED = ("repeats", "torch", "images")
PICTURES = {"augment": augment, "schedule": schedule}


def make_parser() -> argparse.ArgumentParser:
    """Of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m resnet_jax.bench",
        description=bench.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, benchmark in TABLES.items():
        kind = kinds.add_parser(name)
        add_common(kind)
        benchmark.add_arguments(kind)
    kind = kinds.add_parser("all")
    add_common(kind)
    table.add_torch(kind)
    input.add_images(kind)
    for name, picture in PICTURES.items():
        picture.add_arguments(kinds.add_parser(name))
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of every table."""
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument(
        "--json", type=pathlib.Path, metavar="FILE", help="keeps them there"
    )


def part_of_all(name: str, given: argparse.Namespace) -> list[str]:
    """The command with which `all` makes a table."""
    default = make_parser().parse_args([name])
    shared = [key for key in SHARED if key in default]
    changed = [k for k in shared if getattr(given, k) != getattr(default, k)]
    return [name, *(f"--{key}={getattr(given, key)}" for key in changed)]


def main(argv: list[str]) -> None:
    """Command line: see the package's docstring."""
    parser = make_parser()
    args, overrides = parser.parse_known_args(argv[1:])
    if args.what in PICTURES:
        PICTURES[args.what].run(args, overrides)
        return
    if overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    report = table.Report(args.json)
    commands = [argv[1:]]
    if args.what == "all":
        commands = [part_of_all(name, args) for name in ALL]
    for command in commands:
        args = parser.parse_args(command)
        benchmark = TABLES[args.what]
        where = table.machine(benchmark, getattr(args, "torch", sys.executable))
        told = "python -m resnet_jax.bench " + shlex.join(command)
        report.add(told, where, benchmark.rows(args))


if __name__ == "__main__":
    # Of this process alone, which others that call `main` would not expect.
    if sys.argv[1:2] == ["convolutions"]:
        host.keep_freed_memory()
    # So that what a benchmark started ends with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    output.command(main)
