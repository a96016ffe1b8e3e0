"""Seconds until the train step is compiled, and until the command answers."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from resnet_jax.bench import table
from resnet_jax.bench.step import (
    CONTENDERS,
    Child,
    LeftOutError,
    add_network,
    cases_of,
    name_of,
)
from resnet_jax.bench.table import Benchmark, row
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.errors import UserError

HELP = ["-m", "resnet_jax.main", "--help"]
IMPORT = ["-c", "import jax"]


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench compile`."""
    add_network(parser)
    parser.add_argument(
        "--scan",
        action="store_true",
        help="Compares scanned blocks with unrolled ones, in place of the tables.",
    )


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """Two rows a case, fresh and from the cache, and one of `main --help`.

    Every compilation is a process of its own. From a network's definition to its
    compiled step: tracing counts, imports do not.
    """
    for case in cases_of("compile", args):
        yield from _compare(case, args)
    if not args.scan:
        yield _help(args.repeats)


def _compare(case: tuple, args: argparse.Namespace) -> Iterator[dict]:
    task = "compile scanned" if args.scan else "compile"
    ours, peer = CONTENDERS[task]
    fresh: dict[str, list[float]] = {ours: [], peer: []}
    cached: dict[str, list[float]] = {ours: [], peer: []}
    left_out = ""
    for _ in range(args.repeats):
        for who in (ours, peer):
            with tempfile.TemporaryDirectory() as cache:
                try:
                    # The second process finds what the first one compiled.
                    for found in (fresh, cached):
                        found[who].append(_seconds(task, who, case, cache))
                except LeftOutError as error:
                    if who == ours:
                        raise UserError(
                            f"Compiling {name_of(*case)}: {error}."
                        ) from None
                    left_out = str(error)
    name = "compiling the train step of " + name_of(*case)
    if args.scan:
        name += f", {ours}"
    yield row(f"{name}: fresh", "s", fresh[ours], peer, fresh[peer], left_out)
    name += ": from the cache"
    yield row(name, "s", cached[ours], peer, cached[peer], left_out)


def _seconds(task: str, who: str, case: tuple, cache: str) -> float:
    child = Child(sys.executable, task, who, *case, JAX_COMPILATION_CACHE_DIR=cache)
    seconds = child.ask("once")
    child.close()
    output.note(f"{who}: {seconds:.2f} s")
    return seconds


def _help(repeats: int) -> dict:
    seconds: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(repeats):
        for i, arguments in enumerate((HELP, IMPORT)):
            started = time.perf_counter()
            command = [sys.executable, *arguments]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[i].append(time.perf_counter() - started)
    name = "`python -m resnet_jax.main --help`"
    return row(name, "s", seconds[0], '`python -c "import jax"`', seconds[1])


BENCHMARK = Benchmark(add_arguments, rows, (*table.JAX, "optax"))
