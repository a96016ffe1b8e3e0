"""Compares images/s of the train step or of inference with stock Linen and torch.

Every implementation runs in a process of its own, which compiles and warms up first.
The processes then take turns on the same cores, one call at a time.
"""

import argparse
import sys
from collections.abc import Iterator

from resnet_jax import paths
from resnet_jax.bench import table
from resnet_jax.bench.cases import Case, add_case, cases_of, name_of
from resnet_jax.bench.table import Benchmark, row
from resnet_jax.bench.worker import IMPLEMENTATIONS, LeftOutError, Worker
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser
from resnet_jax.errors import UserError


def step_rows(args: argparse.Namespace) -> Iterator[dict]:
    """Yields images/s of the train step, a row for each baseline."""
    if args.profile:
        try:
            args.profile.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--profile={args.profile}: {error.strerror}.") from None
    for case in cases_of("step", args):
        yield from _compare("step", case, args)


def inference_rows(args: argparse.Namespace) -> Iterator[dict]:
    """Yields images/s of the forward pass, a row for each baseline."""
    for case in cases_of("inference", args):
        yield from _compare("inference", case, args)


def _compare(task: str, case: Case, args: argparse.Namespace) -> Iterator[dict]:
    ours, *baselines = IMPLEMENTATIONS[task]
    workers: dict[str, Worker] = {}
    rates: dict[str, list[float]] = {name: [] for name in IMPLEMENTATIONS[task]}
    left_out: dict[str, str] = {}

    def ask(name: str, request: str) -> float:
        """Returns seconds; 0 for a baseline that cannot run, which is then left out."""
        try:
            return workers[name].ask(request)
        except LeftOutError as error:
            if name == ours:
                message = f"The {task} of {name_of(*case)}: {error}."
                raise UserError(message) from None
            workers.pop(name).close()
            left_out[name] = str(error)
            rates[name] = []
            return 0.0

    for name in IMPLEMENTATIONS[task]:
        python = args.torch if name.startswith("torch") else sys.executable
        workers[name] = Worker(python, task, name, *case)
        ask(name, "warm")
    _, _, batch, _ = case
    for _ in range(args.repeats):
        for name in list(workers):
            if seconds := ask(name, "run"):
                rates[name].append(batch / seconds)
                output.note(f"{name}: {rates[name][-1]:.2f}")
    title = f"{'train step' if task == 'step' else task} of {name_of(*case)}"
    for name in baselines:
        reason = left_out.get(name, "")
        yield row(title, "images/s", rates[ours], name, rates[name], reason)
    # The trace comes after the rows, since it takes long and may fail.
    if profile := getattr(args, "profile", None):
        ask(ours, f"profile {profile}")
    for worker in workers.values():
        worker.close()


def _add_step(parser: Parser) -> None:
    add_case(parser)
    table.add_torch(parser)
    parser.add_argument(
        "--profile",
        type=paths.local,
        help="The folder in which a profiler trace of a step is written. Without it,"
        " none is made.",
    )


def _add_inference(parser: Parser) -> None:
    add_case(parser)
    table.add_torch(parser)


STEP = Benchmark(_add_step, step_rows, (*table.JAX, "optax"), table.TORCH)
INFERENCE = Benchmark(_add_inference, inference_rows, table.JAX, table.TORCH)
