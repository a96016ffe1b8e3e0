"""Checks this library on one GPU, where its other requirements may be missing.

It compares logits with the golden figures of the tests, and the speed and memory of the
train step with those of stock Linen and torchvision. It also lists the costliest
kernels.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from resnet_jax import paths
from resnet_jax.bench import table
from resnet_jax.bench.cases import Case, name_of
from resnet_jax.bench.gpu_worker import MAKERS
from resnet_jax.bench.worker import LeftOutError, Worker
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, seconds, words
from resnet_jax.errors import UserError, check_known

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "logits.json"
NEEDED = ("jax", "flax", "optax", "jaxtyping", "psutil")

# One network of each kind. The most important ones come first, since the time may run
# out before the last.
NETWORKS = {
    "resnet50": "bottleneck",
    "resnet18": "basic",
    "resnetv2_18": "pre-activation",
    "ecaresnext26t_32x4d": "ResNeXt, ECA",
    "seresnet18": "SE",
    "resnet18d": "ResNet-D",
    "wrn16_4": "wide",
    "nf_resnet50": "norm-free",
    "resnetv2_50x1_bit": "BiT: group norm, standardized kernels",
    "cifar_resnet20": "zero-padded shortcuts",
    "plain20": "plain",
    "vgg19_bn": "VGG",
    "highway19": "highway",
    "keras_resnet50v2": "Keras: stride in the last block",
    "resnet50_v1": "v1: stride on the first 1x1",
    "resnetrs50": "ResNet-RS: convolution for pooling",
    "tutorial_keras_resnet50": "pooling without a border",
    "resnetblur18": "blur pooling",
    "resnetaa34d": "average pooling for strides",
    "skresnet18": "selective kernels",
    "resnest14d": "split attention",
    "res2net50_14w_8s": "hierarchical",
    "resnetv2_50d_evos": "EvoNorm",
    "resnetv2_50d_frn": "filter response norm",
}
# The bounds of the largest error, as a fraction of the largest golden logit. In float32
# it is the bound of tests/models/test_golden.py. bfloat16 rounds at 2^-9 in every
# layer: on a CPU the errors of these networks are 0.001 to 0.02. The smallest effect of
# a mistake in a network, a bottleneck's stride on the wrong convolution, is 0.12.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.05}
# Standardized kernels and group norm amplify every rounding error, also in float32
# (1e-5); in bfloat16 the error is 0.09 on a CPU.
LOOSER = {("resnetv2_50x1_bit", "bfloat16"): 0.2}

# The default image size, batch size and number of steps: on a GPU, and elsewhere.
SIZES = {True: (224, 128, 20), False: (64, 8, 4)}
# The steps are divided over this number of rounds. In each, all frameworks take turns.
ROUNDS = 4
# The numbers of steps that warm up, and that are profiled.
WARM_UP = 2
PROFILED = 3
# The fraction of the time that logits may take before the train step is measured. The
# remaining logits are computed after it.
LOGITS_SHARE = 0.45


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench gpu`."""
    table.add_torch(parser)
    parser.add_argument(
        "--networks",
        type=words,
        default=list(NETWORKS),
        help="The networks whose logits are compared, separated by commas. The default"
        " is one of each kind.",
    )
    parser.add_argument(
        "--model",
        default="resnet50",
        help="The network whose train step is measured, by its name in the zoo. The"
        " default is %(default)s.",
    )
    on_gpu, elsewhere = SIZES[True], SIZES[False]
    for i, (name, what) in enumerate(
        (
            ("image_size", "The height and width of the images in pixels"),
            ("batch_size", "The number of images per step"),
            ("steps", "The number of steps that are timed"),
        )
    ):
        parser.add_argument(
            f"--{name}",
            type=count,
            help=f"{what}. The default is {on_gpu[i]} on a GPU, and {elsewhere[i]}"
            " elsewhere.",
        )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="The dtype of the train step's computation. The default is %(default)s.",
    )
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=450,
        help="The time limit of the whole check, in seconds or such as 8m. Parts that"
        " do not fit are left out. The default is %(default)s.",
    )
    parser.add_argument(
        "--golden",
        type=paths.local,
        default=GOLDEN,
        help="The JSON file of the golden logits. The default is"
        " tests/golden/logits.json of the checkout.",
    )
    parser.add_argument(
        "--json",
        type=paths.file_to_write,
        default="bench_gpu.json",
        help="The JSON file to which the results are written. The default is"
        " %(default)s.",
    )


class TooLateError(LeftOutError):
    """No time was left for a part of the check."""


class GPUWorker(Worker):
    """A process of the check, which is killed if it does not answer in time."""

    module = "resnet_jax.bench.gpu_worker"

    def ask_within(self, seconds: float, request: str) -> Any:
        """Returns the answer to a request.

        Raises:
          TooLateError: There was no answer within the given seconds.
          LeftOutError: The process cannot answer.
        """
        if seconds <= 0:
            raise TooLateError("no time was left")
        late = threading.Event()

        def end() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            return self.ask(request)
        except LeftOutError:
            if not late.is_set():
                raise
            reason = f"it did not end within the {seconds:.0f} s that were left"
            raise TooLateError(reason) from None
        finally:
            timer.cancel()

    def kill(self) -> None:
        """Kills the process."""
        if self.process:
            self.process.kill()

    def close(self) -> None:
        """Kills the process, which has nothing left to write."""
        self.kill()
        super().close()


@dataclasses.dataclass
class Check:
    """The state of one run of the command.

    Attributes:
      args: The arguments of the command line.
      golden: The golden logits of each network.
      deadline: The time, by `time.monotonic`, at which the check must have ended.
      environment: Environment variables of the processes.
      report: The content of the JSON file.
      logits: The result for each network and dtype; None until it is known.
      workers: All processes that were started.
    """

    args: argparse.Namespace
    golden: dict[str, list[float]]
    deadline: float
    environment: dict[str, str]
    report: dict = dataclasses.field(default_factory=lambda: {"left_out": []})
    logits: dict[tuple[str, str], dict | None] = dataclasses.field(init=False)
    workers: list[GPUWorker] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        cases = itertools.product(self.args.networks, BOUNDS)
        self.logits = dict.fromkeys(cases)

    def start(
        self, python: str, task: str, framework: str, *case: str | int
    ) -> GPUWorker:
        """Starts a process, for which `gpu_worker.main` defines the arguments."""
        worker = GPUWorker(python, task, framework, *case, **self.environment)
        self.workers.append(worker)
        return worker

    def seconds_left(self) -> float:
        """Returns the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def leave_out(self, part: str, reason: str) -> None:
        """Records and prints that a part of the check could not be measured."""
        self.report["left_out"].append({"part": part, "reason": reason})
        _progress(f"left out: {part}: {reason}")

    def write(self) -> None:
        """Writes the results so far to the JSON file."""
        try:
            self.args.json.write_text(json.dumps(self.report, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json={self.args.json}: {error.strerror}.") from None


def run(args: argparse.Namespace) -> None:
    """Runs the check, prints its tables and writes its JSON file.

    Raises:
      UserError: Packages or files that the check needs are missing. It is also raised
        at the end, after all measurements, if logits differ or the train step of this
        library failed.
    """
    started = time.monotonic()
    check_known(f"--dtype={args.dtype}", args.dtype, BOUNDS)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            "The check needs packages that are not installed. Run: pip install"
            f" {' '.join(missing)}"
        )
    check = Check(
        args=args,
        golden=_read_golden(args),
        deadline=started + args.seconds,
        environment=_environment(),
    )
    check.write()
    device = _find_device(check)
    if device["platform"] == "cpu":
        # Without this, plugins of absent devices may still take part in tracing.
        check.environment["JAX_PLATFORMS"] = "cpu"
    on_gpu = device["platform"] == "gpu"
    sizes = {
        name: getattr(args, name) or default
        for name, default in zip(
            ("image_size", "batch_size", "steps"), SIZES[on_gpu], strict=True
        )
    }
    machine = table.machine((*table.JAX, "optax"), table.TORCH, args.torch)
    check.report |= {
        "gpu": on_gpu,
        "device": device,
        "model": args.model,
        "dtype": args.dtype,
        **sizes,
        **machine,
    }
    output.say(f"{_describe(device)}\n\n{table.describe(machine)}\n")

    compare_logits(check, LOGITS_SHARE * check.seconds_left())
    failures = compare_steps(check, **sizes)
    compare_logits(check, check.seconds_left())
    failures = report_logits(check) + failures

    check.report["seconds"] = time.monotonic() - started
    check.write()
    for part in check.report["left_out"]:
        output.say(f"Left out: {part['part']}: {part['reason']}.")
    output.say(f"{check.report['seconds']:.0f} s; the results are in {args.json}.")
    if failures:
        raise UserError(f"{'; '.join(failures)}. See {args.json}.")


def _read_golden(args: argparse.Namespace) -> dict[str, list[float]]:
    try:
        golden = json.loads(args.golden.read_text())
        readable = (ROOT / "tests" / "helpers" / "keyed.py").exists()
    except (OSError, ValueError):
        readable = False
    if not readable:
        raise UserError(
            f"The golden logits in {args.golden} or the helper of the tests that makes"
            " the networks' inputs cannot be read. Run the command in a checkout of the"
            " project, which has both."
        )
    for name in args.networks:
        check_known(f"golden logits of --networks={name}", name, golden)
    return golden


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {
        # JAX chooses the device here; the other benchmarks run on the CPU.
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""),
        # Several processes share the device, and the peak of the memory in use is
        # measured, not that of the memory that XLA reserves.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # The time until the first step has ended includes compiling.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([path] if path else [])]),
    }


def _find_device(check: Check) -> dict:
    """Returns JAX's platform and device kind, and nvidia-smi's line and driver."""
    worker = check.start(sys.executable, "logits", "resnet_jax")
    try:
        device = worker.ask_within(check.seconds_left(), "device")
    except LeftOutError as error:
        raise UserError(f"JAX's device could not be determined: {error}.") from None
    finally:
        worker.close()
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total"]
    try:
        lines = subprocess.run(
            [*command, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        lines = []
    device |= dict.fromkeys(("nvidia_smi", "driver"))
    if lines and lines[0].count(",") == 2:
        device |= {"nvidia_smi": lines[0], "driver": lines[0].split(",")[1].strip()}
    return device


def _describe(device: dict) -> str:
    if device["platform"] == "gpu":
        return f"{device['kind']}, driver {device['driver'] or 'unknown'}."
    text = (
        f"This was not run on a GPU: JAX computes on {device['platform']}. The default"
        " sizes are small."
    )
    if device["driver"]:
        text += (
            f" There is a GPU ({device['nvidia_smi']}) that this JAX does not use. To"
            " use it, unset JAX_PLATFORMS and install jax[cuda13]."
        )
    return text


# Logits.


def compare_logits(check: Check, seconds: float) -> None:
    """Compares the logits that have not been compared yet, within the given seconds."""
    pending = collections.deque(
        case for case, result in check.logits.items() if result is None
    )
    if not pending:
        return
    deadline = time.monotonic() + seconds
    # Most of the time is compiling, which several processes do faster.
    workers = min(4, max(1, len(os.sched_getaffinity(0)) // 2), len(pending))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            futures = [
                pool.submit(_compute_logits, check, pending, deadline)
                for _ in range(workers)
            ]
            for future in futures:
                future.result()
        finally:
            # After an interrupt, the threads must not take further networks.
            pending.clear()
            for worker in check.workers:
                worker.kill()
    check.report["logits"] = [result for result in check.logits.values() if result]
    check.write()


def _compute_logits(
    check: Check, pending: collections.deque[tuple[str, str]], deadline: float
) -> None:
    """Takes networks and dtypes from a queue until it is empty or time has run out."""
    worker = None
    while True:
        try:
            name, dtype = pending.popleft()
        except IndexError:
            break
        worker = worker or check.start(sys.executable, "logits", "resnet_jax")
        seconds = deadline - time.monotonic()
        try:
            answer = worker.ask_within(seconds, f"logits {name} {dtype}")
        except TooLateError:
            break
        except LeftOutError as error:
            answer = {"error": str(error)}
            worker.close()
            worker = None
        result = compare_with_golden(name, dtype, answer, check.golden[name])
        check.logits[name, dtype] = result
        _progress(f"logits of {name} in {dtype}: {_error_cell(result)}")
    if worker:
        worker.close()


def report_logits(check: Check) -> list[str]:
    """Prints the errors of the logits, and returns a sentence for each failure."""
    output.say("| logits of | kind | float32 error (bound) | bfloat16 error (bound) |")
    output.say("|---|---|---|---|")
    for name in check.args.networks:
        cells = [_error_cell(check.logits[name, dtype]) for dtype in BOUNDS]
        output.say(f"| {name} | {NETWORKS.get(name, '')} | {' | '.join(cells)} |")
    output.say("")
    failures = []
    for (name, dtype), result in check.logits.items():
        part = f"logits of {name} in {dtype}"
        if result is None:
            check.leave_out(part, "no time was left")
        elif result["failure"]:
            failures.append(f"The {part} failed: {result['failure']}")
        elif not result["equal"]:
            failures.append(f"The {part} differ from the golden figures")
    return failures


def compare_with_golden(
    name: str, dtype: str, answer: dict, golden: list[float]
) -> dict:
    """Compares the logits of a network with the golden figures.

    Args:
      name: The name of the network.
      dtype: The dtype of the computation.
      answer: The answer of the process: `logits`, or `error`.
      golden: The golden figures.

    Returns:
      The entry of the report: the largest `error` relative to the largest golden
      figure, its `bound`, `equal` if it is within the bound, and `failure`, the reason
      why there is no error ('' if there is one).
    """
    error, failure = None, answer.get("error", "")
    if not failure:
        logits = answer["logits"]
        if len(logits) != len(golden):
            failure = f"there are {len(logits)} figures, not {len(golden)}"
        elif not all(map(math.isfinite, logits)):
            failure = "they are not finite"
        else:
            scale = max(map(abs, golden))
            error = max(abs(a - b) for a, b in zip(logits, golden, strict=True)) / scale
    bound = LOOSER.get((name, dtype), BOUNDS[dtype])
    return {
        "network": name,
        "kind": NETWORKS.get(name, ""),
        "dtype": dtype,
        "error": error,
        "bound": bound,
        "equal": error is not None and error <= bound,
        "failure": failure,
    }


def _error_cell(result: dict | None) -> str:
    if result is None:
        return "left out"
    if result["failure"]:
        return f"FAILED: {result['failure'].replace('|', '/')}"
    text = f"{result['error']:.1e} ({result['bound']:g})"
    return text if result["equal"] else f"DIFFERS: {text}"


# The train step.


def compare_steps(
    check: Check, image_size: int, batch_size: int, steps: int
) -> list[str]:
    """Measures the train step of each framework.

    Args:
      check: The state of the command.
      image_size: The height and width of the images in pixels.
      batch_size: The number of images per step.
      steps: The number of timed steps.

    Returns:
      A sentence if the step of this library failed.
    """
    case: Case = (check.args.model, image_size, batch_size, check.args.dtype)
    name = f"train step of {name_of(*case)}"
    ours = next(iter(MAKERS))
    workers: dict[str, GPUWorker] = {}
    measured: dict[str, dict[str, list[float]]] = {}
    reasons: dict[str, str] = {}
    failures: list[str] = []

    def ask(framework: str, request: str) -> float | None:
        """Returns an answer; None if the framework fails, which is then left out."""
        try:
            return workers[framework].ask_within(check.seconds_left(), request)
        except LeftOutError as error:
            workers.pop(framework).close()
            reasons[framework] = str(error)
            measured.pop(framework, None)
            check.leave_out(f"{name}: {framework}", str(error))
            if framework == ours and not isinstance(error, TooLateError):
                failures.append(f"The {name} failed: {error}")
            return None

    try:
        platform = check.report["device"]["platform"]
        for framework in MAKERS:
            torch = framework.startswith("torch")
            python = check.args.torch if torch else sys.executable
            worker = check.start(python, "step", framework, *case, platform)
            workers[framework] = worker
            seconds = ask(framework, "start")
            if seconds is None or ask(framework, f"steps {WARM_UP}") is None:
                continue
            _progress(f"{framework}: first step after {seconds:.1f} s")
            measured[framework] = {"start": [seconds], "seconds": []}
        for size in _rounds(steps):
            for framework in list(measured):
                seconds = ask(framework, f"steps {size}")
                if seconds is not None:
                    measured[framework]["seconds"].append(seconds)
                    _progress(f"{framework}: {1e3 * seconds:.1f} ms per step")
        for framework in list(measured):
            peak = ask(framework, "memory")
            if peak is not None:
                measured[framework]["memory"] = [peak / 2**30]
        _report_steps(check, name, batch_size, measured, reasons)
        # Profiling comes last: a profiler that does not match the driver may end the
        # process.
        if ours in measured:
            request = f"kernels {PROFILED}"
            try:
                kernels = workers[ours].ask_within(check.seconds_left(), request)
                _report_kernels(check, kernels)
            except LeftOutError as error:
                check.leave_out(f"kernels of the {name}", str(error))
    finally:
        for worker in workers.values():
            worker.close()
    return failures


def _rounds(steps: int) -> Iterator[int]:
    """Yields the number of steps of each round."""
    for i in range(min(ROUNDS, steps)):
        yield len(range(i, steps, ROUNDS))


def _report_steps(
    check: Check,
    step: str,
    batch_size: int,
    measured: dict[str, dict[str, list[float]]],
    reasons: dict[str, str],
) -> None:
    """Records and prints a row for each quantity and baseline."""
    rows: list[dict] = []
    check.report["rows"] = rows
    ours, *baselines = MAKERS
    quantities: tuple[tuple[str, str, str, Callable[[float], float]], ...] = (
        ("speed", "images/s", "seconds", lambda x: batch_size / x),
        ("time of a step", "ms", "seconds", lambda x: 1e3 * x),
        ("peak memory", "GiB", "memory", float),
        ("time until the first step has ended", "s", "start", float),
    )
    for quantity, unit, key, convert in quantities:
        title = f"{step}: {quantity}"
        values = {
            framework: [convert(value) for value in seconds[key]]
            for framework, seconds in measured.items()
        }
        for name in baselines:
            if ours in values:
                new = table.row(
                    title,
                    unit,
                    values[ours],
                    name,
                    values.get(name, ()),
                    reasons.get(name, ""),
                )
                rows.append(new)
            elif name in values:
                rows.append(table.row(f"{title}, {name}", unit, values[name]))
    check.write()
    if rows:
        lines = [table.HEAD, *map(table.as_markdown, rows)]
        output.say("\n".join(lines) + "\n")


def _report_kernels(check: Check, kernels: list[dict]) -> None:
    """Records and prints the costliest kernels."""
    check.report["kernels"] = kernels
    check.write()
    output.say("| kernel | ms per step | share of all kernels | calls per step |")
    output.say("|---|---|---|---|")
    for kernel in kernels:
        output.say(
            f"| {kernel['name'][:80].replace('|', '/')} | {kernel['ms_per_step']:.3f}"
            f" | {kernel['share']:.1%} | {kernel['calls_per_step']:g} |"
        )
    output.say("")


def _progress(text: str) -> None:
    output.note(text)
