"""The command `python -m resnet_jax.bench`; the package's docstring describes it."""

import argparse
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
from resnet_jax.paths import file_to_write

# The benchmarks are given by name, and only the requested one is imported: `gpu` runs
# on machines that lack packages which the others need.
TABLES = {
    "step": "resnet_jax.bench.step_and_inference:STEP",
    "inference": "resnet_jax.bench.step_and_inference:INFERENCE",
    "input": "resnet_jax.bench.input:BENCHMARK",
    "compile": "resnet_jax.bench.compile:BENCHMARK",
    "overhead": "resnet_jax.bench.overhead:BENCHMARK",
    "scale": "resnet_jax.bench.scale:BENCHMARK",
    "convolutions": "resnet_jax.bench.convolutions:BENCHMARK",
}
# The benchmarks that `all` runs, and the flags that it passes on to them.
ALL = ("step", "inference", "input", "compile", "overhead")
SHARED = ("repeats", "torch", "images")
PICTURES = {
    "augment": "resnet_jax.bench.augment",
    "schedule": "resnet_jax.bench.schedule",
}
OTHERS = {"show": "resnet_jax.bench.show", "gpu": "resnet_jax.bench.gpu"}
WHATS = (*TABLES, "all", *PICTURES, *OTHERS)


def import_benchmark(what: str) -> Any:
    """Imports the `Benchmark` of a table, or the module of any other."""
    return pkgutil.resolve_name((TABLES | PICTURES | OTHERS)[what])


def make_parser(what: str) -> Parser:
    """Makes the parser of `bench WHAT`.

    Args:
      what: A name in `WHATS`, whose module is imported; or '' for the parser of
        `bench` without arguments, which imports no module.
    """
    if not what:
        parser = Parser("bench", bench.__doc__)
        parser.add_argument(
            "what",
            metavar="WHAT",
            help=f"The benchmark: {', '.join(WHATS)}. `python -m resnet_jax.bench WHAT"
            " --help` lists its flags.",
        )
        return parser
    parser = Parser(f"bench {what}", None)
    if what in TABLES or what == "all":
        add_common(parser)
    if what == "all":
        names = f"{', '.join(ALL[:-1])} and {ALL[-1]}"
        parser.description = f"Runs the benchmarks {names}, one after the other."
        table.add_torch(parser)
        pkgutil.resolve_name("resnet_jax.bench.input").add_images(parser)
    else:
        module = (TABLES | PICTURES | OTHERS)[what].partition(":")[0]
        # The rest of the docstring is meant for readers of the code.
        parser.description = pkgutil.resolve_name(module).__doc__.splitlines()[0]
        import_benchmark(what).add_arguments(parser)
    return parser


def add_common(parser: Parser) -> None:
    """Adds the arguments that all tables share."""
    parser.add_argument(
        "--repeats",
        type=count,
        default=3,
        help="The number of times that each measurement is repeated. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--json",
        type=file_to_write,
        metavar="FILE",
        help="The JSON file to which the tables are also written. Without it, they are"
        " only printed.",
    )


def command_within_all(name: str, all_args: argparse.Namespace) -> list[str]:
    """Returns the arguments with which `all` runs one of its benchmarks.

    Args:
      name: A name in `ALL`.
      all_args: The parsed arguments of `bench all`.
    """
    default = make_parser(name).parse([])
    shared = [key for key in SHARED if key in default]
    changed = [k for k in shared if getattr(all_args, k) != getattr(default, k)]
    return [name, *(f"--{key}={getattr(all_args, key)}" for key in changed)]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments after the program's name.

    Returns:
      The flags, and `what`: the name of the benchmark.

    Raises:
      UserError: There is no such benchmark or flag, or a value is not valid.
    """
    what = argv[0] if argv else ""
    if what.startswith("-") or not what:
        make_parser("").parse(argv)
    check_known(f"benchmark {what!r}", what, WHATS)
    args = make_parser(what).parse(argv[1:])
    args.what = what
    return args


def main(argv: list[str]) -> None:
    """Runs the command that the package's docstring describes."""
    args = parse(argv[1:])
    if args.what in PICTURES | OTHERS:
        import_benchmark(args.what).run(args)
        return
    report = table.Report(args.json)
    commands = [argv[1:]]
    if args.what == "all":
        commands = [command_within_all(name, args) for name in ALL]
    for command in commands:
        args = parse(command)
        benchmark = import_benchmark(args.what)
        python = getattr(args, "torch", sys.executable)
        machine = table.machine(benchmark.packages, benchmark.baselines, python)
        line = "python -m resnet_jax.bench " + shlex.join(command)
        report.add(line, machine, benchmark.rows(args))


if __name__ == "__main__":
    # This setting holds for the whole process, so callers of `main` do not get it.
    if sys.argv[1:2] == ["convolutions"]:
        process_memory.keep_freed_memory()
    # Exiting by an exception lets a benchmark end the processes that it has started.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    output.command(main)
