"""Measures the seconds to compile the train step, and to answer `main --help`."""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from resnet_jax.bench import table
from resnet_jax.bench.cases import Case, add_case, cases_of, name_of
from resnet_jax.bench.table import Benchmark, row
from resnet_jax.bench.worker import IMPLEMENTATIONS, LeftOutError, Worker
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.errors import UserError

HELP = ["-m", "resnet_jax.main", "--help"]
IMPORT = ["-c", "import jax"]


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench compile`."""
    add_case(parser)
    parser.add_argument(
        "--scan",
        action="store_true",
        help="Compares scanned blocks (model.scan_blocks) with unrolled ones, instead"
        " of this library with stock Linen.",
    )


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """Yields two rows for each case, and one for `main --help`.

    The rows of a case are compiling with an empty and with a filled compilation cache.
    Every compilation runs in a process of its own. It is timed from the definition of
    the network to the compiled step: tracing counts, imports do not.
    """
    for case in cases_of("compile", args):
        yield from _compare(case, args)
    if not args.scan:
        yield _measure_help(args.repeats)


def _compare(case: Case, args: argparse.Namespace) -> Iterator[dict]:
    task = "compile scanned" if args.scan else "compile"
    ours, baseline = IMPLEMENTATIONS[task]
    fresh: dict[str, list[float]] = {ours: [], baseline: []}
    cached: dict[str, list[float]] = {ours: [], baseline: []}
    left_out = ""
    for _ in range(args.repeats):
        for name in (ours, baseline):
            with tempfile.TemporaryDirectory() as cache:
                try:
                    # The second process finds the programs that the first one stored.
                    for seconds in (fresh, cached):
                        seconds[name].append(_seconds(task, name, case, cache))
                except LeftOutError as error:
                    if name == ours:
                        raise UserError(
                            f"Compiling {name_of(*case)}: {error}."
                        ) from None
                    left_out = str(error)
    title = "compiling the train step of " + name_of(*case)
    if args.scan:
        title += f", {ours}"
    for seconds, title_end in ((fresh, "fresh"), (cached, "from the cache")):
        yield row(
            f"{title}: {title_end}",
            "s",
            seconds[ours],
            baseline,
            seconds[baseline],
            left_out,
        )


def _seconds(task: str, name: str, case: Case, cache: str) -> float:
    worker = Worker(sys.executable, task, name, *case, JAX_COMPILATION_CACHE_DIR=cache)
    seconds = worker.ask("once")
    worker.close()
    output.note(f"{name}: {seconds:.2f} s")
    return seconds


def _measure_help(repeats: int) -> dict:
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
