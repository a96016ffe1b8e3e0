"""Speed of a train step and of inference, against stock Linen and torch.

Every contender is a process of its own, which compiles and warms up first; then they
run in turn, a call at a time, on the same cores. This file is also what runs in such a
process; it imports neither jax nor torch, of which a contender may have only one.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from resnet_jax.bench import table
from resnet_jax.bench.table import Benchmark, row
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, counts, words
from resnet_jax.errors import ResNetJaxError, UserError, check_known

# By task and contender: the function that takes model, image size, batch size and type
# and gives what is called; ours first.
CONTENDERS = {
    "step": {
        "resnet_jax": "ours.step",
        "stock Linen": "peer_linen.step",
        "torch eager, channels_last": "peer_torch.step",
    },
    "inference": {
        "resnet_jax": "ours.inference",
        "torch eager, channels_last": "peer_torch.inference",
        "torch.compile, channels_last": "peer_torch.compiled_inference",
    },
    "compile": {
        "resnet_jax": "ours.compile_step",
        "stock Linen": "peer_linen.compile_step",
    },
    "compile scanned": {
        "scanned blocks": "ours.compile_scanned_step",
        "unrolled": "ours.compile_step",
    },
}
# Networks and batch sizes of README.md.
CASES = {
    "step": (("resnet50", [32]), ("cifar_resnet20", [128])),
    "inference": (("resnet50", [1, 32]),),
    "compile": (("resnet50", [32]),),
}
TYPES = ("float32", "bfloat16")
# Peers that know nothing of other devices leave them idle.
ONE_CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
# The least calls and seconds of what a contender can be asked for.
CALLS = {"once": (1, 0.0), "warm": (2, 0.0), "run": (1, 1.0)}


def add_network(parser: Parser) -> None:
    """Adds the network that is measured, and its input."""
    parser.add_argument(
        "--model",
        help="The network, by its name in the zoo. The default is the networks of the"
        " README.",
    )
    parser.add_argument(
        "--image_size",
        type=count,
        help="The height and width of the images in pixels. The default is the"
        " network's own.",
    )
    parser.add_argument(
        "--batch_size",
        type=counts,
        help="The number of images. Several have commas between them. The default is"
        " 32 with --model, and otherwise the README's.",
    )
    parser.add_argument(
        "--dtype",
        type=words,
        default=list(TYPES),
        help="The type of the computation. Several have commas between them. The"
        f" default is {','.join(TYPES)}.",
    )


def cases_of(what: str, args: argparse.Namespace) -> Iterator[tuple]:
    """Model, image size, batch size and type of each case; see `add_network`.

    Raises UserError for what there is not.
    """
    from resnet_jax.models import get_spec
    from resnet_jax.models.zoo import ZOO

    check_types(args.dtype)
    cases = ((args.model, [32]),) if args.model else CASES[what]
    for model, batch_sizes in cases:
        get_spec(model)
        size = args.image_size or ZOO[model].image_size
        batches = args.batch_size or batch_sizes
        for batch, dtype in itertools.product(batches, args.dtype):
            yield model, size, batch, dtype


def check_types(dtypes: Iterable[str]) -> None:
    """Raises UserError for a type that is not measured."""
    for dtype in dtypes:
        check_known(f"--dtype={dtype}", dtype, TYPES)


def name_of(model: str, size: int, batch: int, dtype: str) -> str:
    """A case in words."""
    return f"{model}, {size} px, batch {batch}, {dtype}"


def step_rows(args: argparse.Namespace) -> Iterator[dict]:
    """Images per second of a train step: a row a peer."""
    if args.profile:
        try:
            args.profile.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--profile={args.profile}: {error.strerror}.") from None
    for case in cases_of("step", args):
        yield from _compare("step", case, args)


def inference_rows(args: argparse.Namespace) -> Iterator[dict]:
    """Images per second of a forward pass: a row a peer."""
    for case in cases_of("inference", args):
        yield from _compare("inference", case, args)


def _compare(what: str, case: tuple, args: argparse.Namespace) -> Iterator[dict]:
    ours, *peers = CONTENDERS[what]
    children: dict[str, Child] = {}
    rates: dict[str, list[float]] = {who: [] for who in CONTENDERS[what]}
    left_out: dict[str, str] = {}

    def ask(who: str, line: str) -> float:
        """Seconds; 0 where a peer cannot run, which is then left out."""
        try:
            return children[who].ask(line)
        except LeftOutError as error:
            if who == ours:
                message = f"The {what} of {name_of(*case)}: {error}."
                raise UserError(message) from None
            del children[who]
            left_out[who] = str(error)
            rates[who] = []
            return 0.0

    for who in CONTENDERS[what]:
        python = args.torch if who.startswith("torch") else sys.executable
        children[who] = Child(python, what, who, *case)
        ask(who, "warm")
    for _ in range(args.repeats):
        for who in list(children):
            if seconds := ask(who, "run"):
                rates[who].append(case[2] / seconds)
                output.note(f"{who}: {rates[who][-1]:.2f}")
    task = "train step" if what == "step" else what
    name = f"{task} of {name_of(*case)}"
    for peer in peers:
        out = left_out.get(peer, "")
        yield row(name, "images/s", rates[ours], peer, rates[peer], out)
    # Behind the rows: it takes long, and may fail.
    if profile := getattr(args, "profile", None):
        ask(ours, f"profile {profile}")
    for child in children.values():
        child.close()


def _add_step(parser: Parser) -> None:
    add_network(parser)
    table.add_torch(parser)
    parser.add_argument(
        "--profile",
        type=pathlib.Path,
        help="The folder in which a trace is written. Without it, none is made.",
    )


def _add_inference(parser: Parser) -> None:
    add_network(parser)
    table.add_torch(parser)


STEP = Benchmark(_add_step, step_rows, (*table.JAX, "optax"), table.TORCH)
INFERENCE = Benchmark(_add_inference, inference_rows, table.JAX, table.TORCH)


class LeftOutError(ResNetJaxError):
    """A contender cannot run; the message says why."""


class Child:
    """A contender's process, which answers a line with a line of JSON.

    Attributes:
      module: The module that runs in the process.

    Args:
      python: the interpreter.
      what: a task of `CONTENDERS`.
      who: a contender of it.
      case: model, image size, batch size and type.
      environment: besides this process's.
    """

    module = "resnet_jax.bench.step"

    def __init__(self, python: str, what: str, who: str, *case, **environment: str):
        command = [python, "-m", self.module, what, who]
        try:
            self.process = subprocess.Popen(
                [*command, *map(str, case)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | ONE_CPU | environment,
            )
        except OSError as error:
            self.process = None
            self.failure = f"{python}: {error.strerror}"

    def ask(self, line: str) -> Any:
        """Returns the answer, such as the seconds that a call took.

        Raises:
          LeftOutError: The process has none; the message says why.
        """
        if not self.process:
            raise LeftOutError(self.failure)
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise LeftOutError(f"it ended with exit code {self.process.wait()}")
        found = json.loads(answer)
        if isinstance(found, str):
            self.close()
            raise LeftOutError(found)
        return found

    def close(self) -> None:
        """Ends the process, if there is one."""
        if self.process:
            self.process.communicate()


# In a contender's process.


def prepared(what: str, who: str, model: str, size: int, batch: int, dtype: str):
    """What a contender calls; it may raise ImportError or LookupError."""
    module, _, function = CONTENDERS[what][who].partition(".")
    module = importlib.import_module(f"resnet_jax.bench.{module}")
    return getattr(module, function)(model, size, batch, dtype)


def answers() -> Callable[[Any], None]:
    """Returns the function that answers a line; a string says why there is no more."""
    stdout = os.dup(1)
    # What libraries print must not be taken for an answer.
    os.dup2(2, 1)

    def answer(found: Any) -> None:
        text = json.dumps(found).encode() + b"\n"
        while text:
            text = text[os.write(stdout, text) :]

    return answer


def main(argv: list[str]) -> None:
    """Answers each line of the input with the seconds of a call; see `Child`.

    See `CALLS`; `profile DIR` is a call whose trace is written.
    """
    what, who, model, size, batch, dtype = argv[1:]
    answer = answers()
    try:
        run = prepared(what, who, model, int(size), int(batch), dtype)
    except ModuleNotFoundError as error:
        answer(f"{error.name} is not installed")
        return
    except (ImportError, LookupError, UserError) as error:
        answer(str(error).strip("'."))
        return
    for line in sys.stdin:
        verb, _, argument = line.strip().partition(" ")
        if verb == "profile":
            importlib.import_module("resnet_jax.bench.profiler_trace").profile(
                run, argument
            )
            answer(0.0)
        else:
            answer(_timed(run, *CALLS[verb]))


def _timed(run: Callable[[], None], calls: int, seconds: float) -> float:
    """Seconds of a call, of at least so many calls and seconds."""
    started, made, passed = time.perf_counter(), 0, 0.0
    while made < calls or passed < seconds:
        run()
        made, passed = made + 1, time.perf_counter() - started
    return passed / made


if __name__ == "__main__":
    main(sys.argv)
