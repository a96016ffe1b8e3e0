"""One to several processes on this machine at equal work for each, and beyond it.

Every process of a run is a `python -m resnet_jax.bench.scale`, which reads what to do
from its standard input and writes what it measured to its standard output.
"""

import argparse
import ast
import functools
import importlib.util
import json
import math
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import psutil
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax.bench import table
from resnet_jax.bench.ours import fake_batch, short_config
from resnet_jax.bench.table import Benchmark
from resnet_jax.compiler.chips import CHIPS, chip_of
from resnet_jax.config import override
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, counts, load_config
from resnet_jax.errors import UserError, reason_of
from resnet_jax.models import get_spec
from resnet_jax.parallel import process_memory, processes, sharding
from resnet_jax.persistence.checkpoints import Checkpoints, Progress
from resnet_jax.plan import hlo
from resnet_jax.plan.ask import ask
from resnet_jax.plan.seconds import network_seconds, seconds_of
from resnet_jax.training import programs
from resnet_jax.training.experiment import set_up
from resnet_jax.training.resume import run_checkpoints
from resnet_jax.training.step import TrainState

# Chips of a slice for which `plan` predicts.
SLICES = (8, 64, 512, 4096)
MEASURED = ["together", "alone", "between", "stall", "save", "written", "restore"]
# Seconds that the processes of one measurement may take.
PATIENCE = 1800


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench scale`."""
    parser.add_config("The default is %(default)s.", default="configs/r50.py")
    parser.add_argument(
        "--model",
        default="resnet18",
        help="The network that is trained, by its name in the zoo. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--saved",
        default="resnet152",
        help="The network whose state is saved and restored, by its name in the zoo."
        " The default is %(default)s.",
    )
    parser.add_argument(
        "--processes",
        type=counts,
        default=[1, 2, 4, 8],
        help="The numbers of processes, with commas between them. The default is"
        " 1,2,4,8.",
    )
    parser.add_argument(
        "--image_size",
        type=count,
        default=64,
        help="The height and width of the images in pixels. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--batch_size",
        type=count,
        default=8,
        help="The number of images per step and process. The default is %(default)s.",
    )
    parser.add_argument(
        "--steps",
        type=count,
        default=20,
        help="The number of steps that are timed together. The default is %(default)s.",
    )
    parser.add_argument(
        "--between",
        type=float,
        default=20.0,
        help="The time in seconds from one save to the next. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="The type of the computation. The default is %(default)s.",
    )
    parser.add_argument(
        "--topology",
        help="A TPU slice, such as v5e:2x4, for which `plan` predicts. Without it,"
        " nothing is predicted.",
    )


def rows(args: argparse.Namespace) -> Iterator[dict]:
    """Of all numbers of processes, of a large checkpoint, and of predictions."""
    # What is wrong is told before anything is measured.
    for model in (args.model, args.saved):
        get_spec(model)
    if args.topology and not chip_of(args.topology):
        raise UserError(f"--topology={args.topology}: only TPUs are predicted for.")
    case = args.model, args.image_size, args.batch_size, args.dtype
    config = short_config(args.config, *case, steps=args.steps)
    override(config, args.overrides)
    for number in args.processes:
        yield from _of_processes(config, number, args)
    yield from _of_checkpoint(config, args.saved, args.repeats)
    if args.topology:
        yield from predictions(load_config(args), args.topology)


def _of_processes(
    config: ConfigDict, number: int, args: argparse.Namespace
) -> Iterator[dict]:
    config = ConfigDict(config.to_dict())
    config.batch_size *= number
    with config.ignore_type():
        # So that statistics do not depend on the number of processes.
        config.model.bn_group_size = "device"
    request = {key: getattr(args, key) for key in ("steps", "between", "repeats")}
    found = run(number, {"config": config.to_dict(), **request})
    first = found[0]
    name = f"scale {config.model.name} {number} process{'es' if number > 1 else ''}"

    row = functools.partial(_named, f"{name}: ")
    together, alone = first["together"], first["alone"]
    yield row("step", "s", together, "of its own part alone", alone)
    shares = [1 - a / t for t, a in zip(together, alone, strict=True)]
    yield row("in collectives", "of the step", shares)
    yield row("collectives", "MB a step", [first["bytes"] / 1e6])
    yield row("start-up", "s", [max(one["start"] for one in found)])
    yield row("stall of a save", "s", first["stall"], "between saves", first["between"])
    yield row("save call", "s", first["save"], "between saves", first["between"])
    yield row("first restore", "s", first["restore"][:1])
    yield row("restore", "s", first["restore"][1:])


def _of_checkpoint(config: ConfigDict, model: str, repeats: int) -> Iterator[dict]:
    config = ConfigDict(config.to_dict())
    config.model.name = model
    with config.ignore_type():
        config.model.bn_group_size = "device"
    (found,) = run(1, {"config": config.to_dict(), "steps": 0, "repeats": repeats})
    row = functools.partial(_named, f"checkpoint {model}: ")
    yield row("save call", "s", found["save"])
    yield row("until on disk", "s", found["written"])
    # The first one compiles what it checks values with, as a run that starts does.
    yield row("first restore", "s", found["restore"][:1])
    yield row("restore", "s", found["restore"][1:])


def _named(before: str, what: str, *rest) -> dict:
    return table.row(before + what, *rest)


def predictions(config: ConfigDict, topology: str) -> Iterator[dict]:
    """What `plan` expects of slices of other sizes, or a note that it cannot."""
    if not importlib.util.find_spec("libtpu"):
        output.note(
            f"No prediction for {topology}: it needs libtpu, the compiler for TPUs (pip"
            " install libtpu)."
        )
        return
    facts = ask(config, topology, evaluation=False)
    if "memory" not in facts["train"]:
        raise UserError(f"{config.model.name} does not fit {topology}; see plan.")
    chip, train, chips = CHIPS[chip_of(topology)], facts["train"], facts["chips"]
    alone = max(seconds_of(train, chip, facts["devices"] // chips).values())
    for number in SLICES:
        network = network_seconds(
            train["collectives"],
            chips,
            facts["devices"],
            number,
            chip,
            facts.get("slices", 1),
        )
        if not math.isfinite(network):
            continue
        name = f"plan {config.model.name} {number} chips of {chip_of(topology)}"
        share = network / (alone + network)
        yield table.row(f"{name}: in collectives", "of the step", [share])
    size = sum(one["times"] * one["bytes"] for one in train["collectives"])
    name = f"plan {config.model.name} {topology}: collectives"
    yield table.row(name, "MB a step", [size / 1e6])


# Processes.


def run(number: int, request: dict) -> list[dict]:
    """What each of the processes of one measurement found; raises UserError."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    others = {*psutil.Process().children()}
    with tempfile.TemporaryDirectory(prefix="resnet_jax_scale_") as directory:
        shared = {"number": number, "port": port, "directory": directory}
        try:
            started = [
                subprocess.Popen(
                    [sys.executable, "-m", "resnet_jax.bench.scale"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
                for _ in range(number)
            ]
            for i, process in enumerate(started):
                process.stdin.write(repr(request | shared | {"index": i}))
                process.stdin.close()
                # Else `communicate` would flush it.
                process.stdin = None
            ends = [process.communicate(timeout=PATIENCE) for process in started]
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{number} processes took more than {PATIENCE} s; take fewer --steps."
            ) from None
        finally:
            # Not those of `started`: a SIGTERM may come before it is made.
            for process in {*psutil.Process().children()} - others:
                process.kill()
    for process, (_, errors) in zip(started, ends, strict=True):
        if process.returncode:
            raise UserError(f"One of {number} processes failed: {reason_of(errors)}")
    return [json.loads(output.splitlines()[-1]) for output, _ in ends]


class Loop:
    """A train step called again and again on one batch, as training does."""

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self.setup = set_up(config, mesh)
        self.step = programs.compile_train_step(self.setup)
        self.state = programs.init_state(self.setup)
        self.batch = fake_batch(self.setup)
        self.seconds(1)

    def seconds(self, steps: int) -> float:
        """Of some steps, that all processes begin at once."""
        processes.agree("steps", "")
        started = time.perf_counter()
        for _ in self._take(steps):
            pass
        return time.perf_counter() - started

    def seconds_with_save(
        self, steps: int, save: Callable[[TrainState], None], saved: Checkpoints
    ) -> tuple[float, float]:
        """Of some steps without a save, and how much longer it makes those at its time.

        Those just before it tell how long a step is: others differ from each other by
        more than a save takes.
        """
        before = steps // 2 or 1
        usual = self.seconds(before) / before
        started = time.perf_counter()
        save(self.state)
        stall, saving = 0.0, True
        # No fewer when it is on disk, which the processes may see at different steps.
        for ended, _ in enumerate(self._take(steps - before + 1)):
            if saving:
                stall = time.perf_counter() - started - ended * usual
                saving = saved.is_saving()
        return steps * usual, stall

    def _take(self, steps: int) -> Iterator[None]:
        """Takes steps; when it yields, all have ended but the one that was begun."""
        last = None
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
            # As in training, no more than a step is waiting.
            jax.block_until_ready(last)
            last = metrics
            yield
        jax.block_until_ready(self.state)


def measure(request: dict) -> dict:
    """What one process finds, in seconds but for `bytes` (of a step's collectives).

    `start`: from the process to the end of the first step. `together` and `alone`: a
    step of all processes, and one of each on its own part of the work, at the same
    time. `between`: the steps from one save to the next, some `between` of the request,
    if none is made; `stall`: how much longer those take until it is on disk, and `save`
    the part of it in which the loop waits for the call. `written`: until the checkpoint
    is on disk, if there are no steps. `restore`: with its check of all values, the
    first one with what that compiles.
    """
    began = psutil.Process().create_time()
    if request["number"] > 1:
        address = f"localhost:{request['port']}"
        processes.connect(address, request["number"], request["index"], 300)
    config, steps = ConfigDict(request["config"]), request["steps"]
    workdir, repeats = pathlib.Path(request["directory"]), request["repeats"]
    found: dict = {key: [] for key in MEASURED}

    if steps:
        loop = Loop(config, sharding.make_mesh())
        found["start"] = time.time() - began
        found["bytes"] = sum(
            one.times * one.bytes for one in hlo.collectives(loop.step.as_text())
        )
        part = ConfigDict(config.to_dict())
        part.batch_size //= request["number"]
        alone = Loop(part, sharding.make_mesh(jax.local_devices()))
        for _ in range(repeats):
            found["together"].append(loop.seconds(steps) / steps)
            found["alone"].append(alone.seconds(steps) / steps)
        setup, state = loop.setup, loop.state
        enough = request["between"] / statistics.median(found["together"])
        # As many on all processes.
        steps = int(processes.run_on_lead("steps", lambda: str(round(enough) or 1)))
    else:
        setup = set_up(config)
        state = programs.init_state(setup)

    def save(state: TrainState) -> None:
        # The step that gives it is not part of saving it.
        jax.block_until_ready(state)
        started = time.perf_counter()
        number = len(found["save"])
        saved.save(state, Progress(step=number))
        found["save"].append(time.perf_counter() - started)

    with run_checkpoints(setup, workdir) as saved:
        for _ in range(repeats + 1):
            if steps:
                between, stall = loop.seconds_with_save(steps, save, saved)
                found["between"].append(between)
                found["stall"].append(stall)
                saved.wait()
            else:
                started = time.perf_counter()
                save(state)
                saved.wait()
                found["written"].append(time.perf_counter() - started)
        # The first save compiles.
        for key in ("save", "stall", "between", "written"):
            del found[key][:1]
        state = None
        jax.clear_caches()
        for _ in range(repeats + 1):
            processes.agree("restore", "")
            started = time.perf_counter()
            jax.block_until_ready(saved.restore_latest(programs.state_like(setup))[0])
            found["restore"].append(time.perf_counter() - started)
    return found


BENCHMARK = Benchmark(add_arguments, rows, (*table.JAX, "orbax-checkpoint"))


def main() -> None:
    """Answers one request: the dictionary of literals that `measure` takes."""
    # Whatever else is printed must not mix with the answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    found = measure(ast.literal_eval(sys.stdin.read()))
    print(json.dumps(found), file=answer, flush=True)


if __name__ == "__main__":
    # As `main` does on CPUs.
    process_memory.keep_freed_memory()
    main()
