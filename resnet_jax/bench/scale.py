"""Measures how training scales over processes, and predicts it for slices of TPUs.

Every process of a run executes `python -m resnet_jax.bench.scale`, which reads a
request from its standard input and writes its measurements to its standard output.
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
from typing import Any

import jax
import psutil
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax.bench import table
from resnet_jax.bench.own_programs import fake_batch, short_config
from resnet_jax.bench.table import Benchmark
from resnet_jax.compiler.chips import CHIPS, chip_of
from resnet_jax.config import override
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, counts, load_config, seconds
from resnet_jax.errors import UserError, reason_in_output
from resnet_jax.models import get_spec
from resnet_jax.parallel import process_memory, processes, sharding
from resnet_jax.persistence.checkpoints import Checkpoints, Progress
from resnet_jax.plan import hlo
from resnet_jax.plan.compile_subprocess import compile_config
from resnet_jax.plan.time_model import network_seconds, seconds_of
from resnet_jax.training import programs
from resnet_jax.training.experiment import set_up
from resnet_jax.training.resume import run_checkpoints
from resnet_jax.training.step import TrainState

# The numbers of chips for which predictions are made.
SLICES = (8, 64, 512, 4096)
# The measurements of a process that are repeated; see `measure`.
REPEATED = ("together", "alone", "between", "stall", "save", "written", "restore")
# The time limit of the processes of one measurement, in seconds.
TIMEOUT = 1800
# A function that makes one measurement. It takes the number of processes and their
# request, and returns the result of each.
Run = Callable[[int, dict], list[dict]]


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
        help="The numbers of processes to compare, separated by commas. The default is"
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
        help="The number of steps in each timed interval. The default is %(default)s.",
    )
    parser.add_argument(
        "--between",
        type=seconds,
        default=20.0,
        help="The time between two saves, in seconds or such as 1m. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        help="The dtype of the computation. The default is %(default)s.",
    )
    parser.add_argument(
        "--topology",
        help="A TPU slice, such as v5e:2x4, that `plan` compiles for to predict the"
        " share of collectives. Without it, nothing is predicted.",
    )


def rows(args: argparse.Namespace, run: Run | None = None) -> Iterator[dict]:
    """Yields the rows of all numbers of processes, a large checkpoint and predictions.

    Args:
      args: The arguments of `bench scale`.
      run: Makes one measurement; `run_processes` by default.

    Raises:
      UserError: There is no such network or slice, or a process failed.
    """
    # These checks come before the first measurement, which takes minutes.
    for model in (args.model, args.saved):
        get_spec(model)
    if args.topology and not chip_of(args.topology):
        raise UserError(
            f"--topology={args.topology} is not a TPU slice. Predictions are made for"
            " TPUs only, for example --topology=v5e:2x4."
        )
    run = run or run_processes
    case = args.model, args.image_size, args.batch_size, args.dtype
    config = short_config(args.config, *case, steps=args.steps)
    override(config, args.overrides)
    for number in args.processes:
        yield from _rows_of_processes(config, number, args, run)
    yield from _rows_of_checkpoint(config, args.saved, args.repeats, run)
    if args.topology:
        yield from predictions(load_config(args), args.topology)


def _rows_of_processes(
    config: ConfigDict, number: int, args: argparse.Namespace, run: Run
) -> Iterator[dict]:
    config = ConfigDict(config.to_dict())
    config.batch_size *= number
    with config.ignore_type():
        # Each device normalizes its own images, so the number of processes does not
        # change the statistics.
        config.model.bn_group_size = "device"
    request = {key: getattr(args, key) for key in ("steps", "between", "repeats")}
    results = run(number, {"config": config.to_dict(), **request})
    first = results[0]
    name = f"scale {config.model.name} {number} process{'es' if number > 1 else ''}"

    row = functools.partial(_row, f"{name}: ")
    together, alone = first["together"], first["alone"]
    yield row("step", "s", together, "the same part of the work alone", alone)
    shares = [1 - a / t for t, a in zip(together, alone, strict=True)]
    yield row("in collectives", "of the step", shares)
    yield row("collectives", "MB per step", [first["bytes"] / 1e6])
    yield row("start-up", "s", [max(result["start"] for result in results)])
    yield row("stall of a save", "s", first["stall"], "between saves", first["between"])
    yield row("save call", "s", first["save"], "between saves", first["between"])
    yield row("first restore", "s", first["restore"][:1])
    yield row("restore", "s", first["restore"][1:])


def _rows_of_checkpoint(
    config: ConfigDict, model: str, repeats: int, run: Run
) -> Iterator[dict]:
    config = ConfigDict(config.to_dict())
    config.model.name = model
    with config.ignore_type():
        config.model.bn_group_size = "device"
    (result,) = run(1, {"config": config.to_dict(), "steps": 0, "repeats": repeats})
    row = functools.partial(_row, f"checkpoint {model}: ")
    yield row("save call", "s", result["save"])
    yield row("until on disk", "s", result["written"])
    # The first restore compiles the check of the values, as it does when a run resumes.
    yield row("first restore", "s", result["restore"][:1])
    yield row("restore", "s", result["restore"][1:])


def _row(prefix: str, name: str, *rest) -> dict:
    return table.row(prefix + name, *rest)


def predictions(
    config: ConfigDict,
    topology: str,
    compile_config: Callable[..., dict] = compile_config,
) -> Iterator[dict]:
    """Yields what `plan` predicts for slices of several sizes.

    Args:
      config: The config of the run.
      topology: The TPU slice for which the step is compiled, such as `v5e:2x4`.
      compile_config: Compiles; see `compile_subprocess.compile_config`.

    Yields:
      The rows; none if libtpu is not installed, which is printed.

    Raises:
      UserError: The step does not fit the slice.
    """
    if not importlib.util.find_spec("libtpu"):
        output.note(
            f"There are no predictions for {topology}: they need libtpu, the compiler"
            " for TPUs (pip install libtpu)."
        )
        return
    facts = compile_config(config, topology, evaluation=False)
    if "memory" not in facts["train"]:
        raise UserError(
            f"{config.model.name} does not fit {topology}. `python -m resnet_jax.plan`"
            " shows the memory that it needs."
        )
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
    size = sum(each["times"] * each["bytes"] for each in train["collectives"])
    name = f"plan {config.model.name} {topology}: collectives"
    yield table.row(name, "MB per step", [size / 1e6])


# Processes.


def run_processes(number: int, request: dict) -> list[dict]:
    """Starts the processes of one measurement, and waits for their results.

    Args:
      number: The number of processes.
      request: The request; see `measure`, which each process calls.

    Returns:
      The result of each process.

    Raises:
      UserError: A process failed, or they took longer than `TIMEOUT`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    older = {*psutil.Process().children()}
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
                assert process.stdin
                process.stdin.write(repr(request | shared | {"index": i}))
                process.stdin.close()
                # `communicate` would flush the closed stream, which fails.
                process.stdin = None
            ends = [process.communicate(timeout=TIMEOUT) for process in started]
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{number} processes took more than {TIMEOUT} s. Give fewer --steps."
            ) from None
        finally:
            # A SIGTERM may come before `started` is assigned, so that the new children
            # of this process are ended instead.
            for process in {*psutil.Process().children()} - older:
                process.kill()
    for process, (_, errors) in zip(started, ends, strict=True):
        if process.returncode:
            raise UserError(
                f"One of {number} processes failed: {reason_in_output(errors)}"
            )
    return [json.loads(output.splitlines()[-1]) for output, _ in ends]


class Loop:
    """Calls a train step repeatedly on one batch, in the way that training does."""

    def __init__(self, config: ConfigDict, mesh: Mesh):
        self.setup = set_up(config, mesh)
        lowered = programs.lower_train_step(self.setup)
        self.step = programs.compile_lowered(self.setup, lowered)
        self.state = programs.init_state(self.setup)
        self.batch = fake_batch(self.setup)
        self.seconds(1)

    def seconds(self, steps: int) -> float:
        """Returns the seconds of some steps, which all processes start together."""
        processes.agree("steps", "")
        started = time.perf_counter()
        for _ in self._take(steps):
            pass
        return time.perf_counter() - started

    def seconds_with_save(
        self, steps: int, save: Callable[[TrainState], None], saved: Checkpoints
    ) -> tuple[float, float]:
        """Measures by how much a save delays the steps that run meanwhile.

        The steps just before the save show how long a step takes. Steps of other times
        are not comparable, since they vary by more than a save takes.

        Args:
          steps: The number of steps.
          save: Starts to save a state.
          saved: The checkpoints to which it is saved.

        Returns:
          The seconds that all steps would take without the save, and the seconds by
          which the save makes them longer.
        """
        before = steps // 2 or 1
        usual = self.seconds(before) / before
        started = time.perf_counter()
        save(self.state)
        stall, saving = 0.0, True
        # The number of steps is fixed, since the processes may see the end of the save
        # at different steps.
        for ended, _ in enumerate(self._take(steps - before + 1)):
            if saving:
                stall = time.perf_counter() - started - ended * usual
                saving = saved.is_saving()
        return steps * usual, stall

    def _take(self, steps: int) -> Iterator[None]:
        """Takes steps; at each yield all have ended but the one just started."""
        last = None
        for _ in range(steps):
            self.state, metrics = self.step(self.state, self.batch)
            # As in training, at most one step is queued behind the running one.
            jax.block_until_ready(last)
            last = metrics
            yield
        jax.block_until_ready(self.state)


def measure(request: dict) -> dict:
    """Measures one process of a run.

    Args:
      request: A dictionary of literals. `config`: the config, as a dictionary; `steps`:
        the number of steps in each timed interval, 0 to measure checkpoints only;
        `between`: the seconds between two saves; `repeats`: the number of repeats;
        `number`: the number of processes; `index`: the index of this process; `port`:
        the port of the coordinator; `directory`: the directory of the checkpoints.

    Returns:
      Lists of seconds, one for each repeat, unless stated otherwise.
      `bytes`: The number of bytes that a step's collectives move.
      `start`: From the start of the process to the end of its first step; one number.
      `together`: A step of all processes.
      `alone`: A step of each process on its own part of the work, at the same time.
      `between`: The steps from one save to the next, as they would be without a save.
      `stall`: By how much these steps take longer until the checkpoint is on disk.
      `save`: The part of the stall in which the loop waits for the call.
      `written`: Until the checkpoint is on disk, if there are no steps.
      `restore`: Restoring and checking all values; one more than the repeats, since
        the first restore also compiles the check.
    """
    began = psutil.Process().create_time()
    if request["number"] > 1:
        address = f"localhost:{request['port']}"
        processes.connect(address, request["number"], request["index"], 300)
    config, steps = ConfigDict(request["config"]), request["steps"]
    workdir, repeats = pathlib.Path(request["directory"]), request["repeats"]
    results: dict[str, Any] = {key: [] for key in REPEATED}

    if steps:
        loop = Loop(config, sharding.make_mesh())
        results["start"] = time.time() - began
        results["bytes"] = sum(
            each.times * each.bytes
            for each in hlo.collectives(loop.step.as_text() or "")
        )
        part = ConfigDict(config.to_dict())
        part.batch_size //= request["number"]
        alone = Loop(part, sharding.make_mesh(jax.local_devices()))
        for _ in range(repeats):
            results["together"].append(loop.seconds(steps) / steps)
            results["alone"].append(alone.seconds(steps) / steps)
        setup, state = loop.setup, loop.state
        enough = request["between"] / statistics.median(results["together"])
        # The first process decides, so that all take the same number of steps.
        steps = int(processes.run_on_lead("steps", lambda: str(round(enough) or 1)))
    else:
        setup = set_up(config)
        state = programs.init_state(setup)

    def save(state: TrainState) -> None:
        # The step that computes the state is not part of the save.
        jax.block_until_ready(state)
        started = time.perf_counter()
        number = len(results["save"])
        saved.save(state, Progress(step=number))
        results["save"].append(time.perf_counter() - started)

    with run_checkpoints(setup, workdir) as saved:
        for _ in range(repeats + 1):
            if steps:
                between, stall = loop.seconds_with_save(steps, save, saved)
                results["between"].append(between)
                results["stall"].append(stall)
                saved.wait()
            else:
                started = time.perf_counter()
                save(state)
                saved.wait()
                results["written"].append(time.perf_counter() - started)
        # The first save is left out, since it compiles.
        for key in ("save", "stall", "between", "written"):
            del results[key][:1]
        # Restoring begins as in a new process, without the state and compiled programs.
        del state
        jax.clear_caches()
        for _ in range(repeats + 1):
            processes.agree("restore", "")
            started = time.perf_counter()
            restored = saved.restore_latest(programs.state_like(setup))
            assert restored, "nothing was saved"
            jax.block_until_ready(restored[0])
            results["restore"].append(time.perf_counter() - started)
    return results


BENCHMARK = Benchmark(add_arguments, rows, (*table.JAX, "orbax-checkpoint"))


def main() -> None:
    """Reads the request of `measure` and prints its result as JSON."""
    # Other output must not mix with the answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    results = measure(ast.literal_eval(sys.stdin.read()))
    print(json.dumps(results), file=answer, flush=True)


if __name__ == "__main__":
    # The training command sets this on CPUs, too.
    process_memory.keep_freed_memory()
    main()
