"""A check of this library on one GPU, for a machine without its other requirements.

It compares logits with the golden figures of the tests, and the train step with stock
Linen and torchvision: speed, memory, and the kernels that take longest.
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
from collections.abc import Iterator

from resnet_jax.bench import table
from resnet_jax.bench.gpu_worker import MAKERS
from resnet_jax.bench.step import Child, LeftOutError, name_of
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, words
from resnet_jax.errors import UserError, check_known

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "logits.json"
NEEDED = ("jax", "flax", "optax", "jaxtyping", "psutil")

# One network of each kind. Those that matter most come first, since the time may end.
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
# The largest error, in units of the largest golden logit. In float32 the bound is that
# of tests/models/test_golden.py. bfloat16 rounds at 2^-9 in every layer: on a CPU these
# networks err by 0.001 to 0.02, and the mildest of a network's mistakes, the stride of
# a bottleneck on the wrong convolution, makes 0.12.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.05}
# Standardized kernels and group norm enlarge every rounding, in float32 (1e-5) as well;
# in bfloat16 it erred by 0.09 on a CPU.
LOOSER = {("resnetv2_50x1_bit", "bfloat16"): 0.2}

# Image size, images and steps, where flags do not say: on a GPU, and elsewhere.
SIZES = {True: (224, 128, 20), False: (64, 8, 4)}
# The steps are measured in so many rounds, in which all frameworks run in turn.
ROUNDS = 4
WARM_UP = 2
PROFILED = 3
# Logits may take this part of the time before the train step is measured; what is
# missing then is computed after it.
LOGITS_SHARE = 0.45


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench gpu`."""
    table.add_torch(parser)
    parser.add_argument(
        "--networks",
        type=words,
        default=list(NETWORKS),
        help="The networks whose logits are compared, with commas between them. The"
        " default is one of each kind.",
    )
    parser.add_argument(
        "--model",
        default="resnet50",
        help="The network of the train step, by its name in the zoo. The default is"
        " %(default)s.",
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
        help="The type of the train step's computation. The default is %(default)s.",
    )
    parser.add_argument(
        "--seconds",
        type=count,
        default=450,
        help="The time for everything in seconds; parts that do not fit into it are"
        " left out. The default is %(default)s.",
    )
    parser.add_argument(
        "--golden",
        type=pathlib.Path,
        default=GOLDEN,
        help="The file of the golden logits. The default is tests/golden/logits.json"
        " of the checkout.",
    )
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        default=pathlib.Path("bench_gpu.json"),
        help="The file of the results. The default is %(default)s.",
    )


class TooLateError(LeftOutError):
    """No time was left for a part of the check."""


class Part(Child):
    """A process of the check, which is killed if it does not answer in time."""

    module = "resnet_jax.bench.gpu_worker"

    def within(self, seconds: float, line: str):
        """Returns the answer to a line; raises TooLateError if none comes in time."""
        if seconds <= 0:
            raise TooLateError("no time was left")
        late = threading.Event()

        def end() -> None:
            late.set()
            self.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            return self.ask(line)
        except LeftOutError:
            if not late.is_set():
                raise
            reason = f"it did not end within the {seconds:.0f} s that were left"
            raise TooLateError(reason) from None
        finally:
            timer.cancel()

    def kill(self) -> None:
        """Ends the process at once, whatever it computes."""
        if self.process:
            self.process.kill()

    def close(self) -> None:
        """Ends the process; it has nothing to write."""
        self.kill()
        super().close()


@dataclasses.dataclass
class Check:
    """The state of one run of the command.

    Attributes:
      args: The arguments of the command line.
      golden: The golden logits of each network.
      ends: The time, by `time.monotonic`, at which everything must have ended.
      environment: Environment variables of the processes.
      report: The content of the JSON file.
      logits: The result for each network and type; None before it is there.
      parts: All processes that were started.
    """

    args: argparse.Namespace
    golden: dict[str, list[float]]
    ends: float
    environment: dict[str, str]
    report: dict = dataclasses.field(default_factory=lambda: {"left_out": []})
    logits: dict[tuple[str, str], dict | None] = dataclasses.field(init=False)
    parts: list[Part] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        cases = itertools.product(self.args.networks, BOUNDS)
        self.logits = dict.fromkeys(cases)

    def start(self, python: str, *arguments: str | int) -> Part:
        """Starts a process; `gpu_child.main` has the arguments."""
        part = Part(python, *arguments, **self.environment)
        self.parts.append(part)
        return part

    def left(self) -> float:
        """Returns the seconds that are left."""
        return self.ends - time.monotonic()

    def leave_out(self, part: str, reason: str) -> None:
        """Records a part that could not be measured, and prints it."""
        self.report["left_out"].append({"part": part, "reason": reason})
        _progress(f"left out: {part}: {reason}")

    def write(self) -> None:
        """Writes the JSON file, with what there is so far."""
        try:
            self.args.json.write_text(json.dumps(self.report, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--json={self.args.json}: {error.strerror}.") from None


def run(args: argparse.Namespace) -> None:
    """Runs the check, prints its tables and writes its file.

    Raises:
      UserError: Something that the check needs is missing; logits differ; or the train
        step of this library failed. Everything else was measured before.
    """
    started = time.monotonic()
    check_known(f"--dtype={args.dtype}", args.dtype, BOUNDS)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"The check needs packages that are not installed; run: pip install"
            f" {' '.join(missing)}"
        )
    check = Check(
        args=args,
        golden=_read_golden(args),
        ends=started + args.seconds,
        environment=_environment(),
    )
    check.write()
    device = _device(check)
    if device["platform"] == "cpu":
        # Plugins of devices that are not there may still take part in tracing.
        check.environment["JAX_PLATFORMS"] = "cpu"
    on_gpu = device["platform"] == "gpu"
    sizes = {
        name: getattr(args, name) or default
        for name, default in zip(
            ("image_size", "batch_size", "steps"), SIZES[on_gpu], strict=True
        )
    }
    where = table.machine((*table.JAX, "optax"), table.TORCH, args.torch)
    check.report |= {
        "gpu": on_gpu,
        "device": device,
        "model": args.model,
        "dtype": args.dtype,
        **sizes,
        **where,
    }
    output.say(f"{_about(device)}\n\n{table.describe(where)}\n")

    compare_logits(check, LOGITS_SHARE * check.left())
    failures = compare_steps(check, **sizes)
    compare_logits(check, check.left())
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
        found = (ROOT / "tests" / "helpers" / "keyed.py").exists()
    except (OSError, ValueError):
        found = False
    if not found:
        raise UserError(
            f"{args.golden} or tests/helpers/keyed.py cannot be read, with which"
            " logits are compared; run the command in a checkout of"
            " the project, which has both."
        )
    for name in args.networks:
        check_known(f"golden logits of --networks={name}", name, golden)
    return golden


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {
        # The device that JAX chooses, where the other tables take the CPU.
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", ""),
        # Several processes share the device, and peaks are to be of what is in use.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # The time until the first step includes compiling.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([path] if path else [])]),
    }


def _device(check: Check) -> dict:
    """Returns JAX's platform and device kind, and what nvidia-smi says of the GPU."""
    part = check.start(sys.executable, "logits", "resnet_jax")
    try:
        device = part.within(check.left(), "device")
    except LeftOutError as error:
        raise UserError(f"JAX did not say which device it has: {error}.") from None
    finally:
        part.close()
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total"]
    try:
        told = subprocess.run(
            [*command, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        ).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        told = []
    device |= dict.fromkeys(("nvidia_smi", "driver"))
    if told and told[0].count(",") == 2:
        device |= {"nvidia_smi": told[0], "driver": told[0].split(",")[1].strip()}
    return device


def _about(device: dict) -> str:
    if device["platform"] == "gpu":
        return f"{device['kind']}, driver {device['driver'] or 'unknown'}."
    text = (
        f"This was not run on a GPU: JAX computes on {device['platform']}, and sizes"
        " are small unless flags set them."
    )
    if device["driver"]:
        text += (
            f" There is a GPU ({device['nvidia_smi']}) that this JAX does not use; it"
            " needs JAX_PLATFORMS unset and jax[cuda13] installed."
        )
    return text


# Logits.


def compare_logits(check: Check, seconds: float) -> None:
    """Compares the logits that were not compared before, as far as the time goes."""
    pending = collections.deque(
        case for case, result in check.logits.items() if result is None
    )
    if not pending:
        return
    ends = time.monotonic() + seconds
    # Nearly all of the time is compiling, which gains from several processes.
    workers = min(4, max(1, len(os.sched_getaffinity(0)) // 2), len(pending))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            made = [
                pool.submit(_compute_logits, check, pending, ends)
                for _ in range(workers)
            ]
            for worker in made:
                worker.result()
        finally:
            # After an interrupt, the workers must not go on.
            pending.clear()
            for part in check.parts:
                part.kill()
    check.report["logits"] = [result for result in check.logits.values() if result]
    check.write()


def _compute_logits(
    check: Check, pending: collections.deque[tuple[str, str]], ends: float
) -> None:
    """Takes networks and types from a queue until it is empty or the time is over."""
    part = None
    while True:
        try:
            name, dtype = pending.popleft()
        except IndexError:
            break
        part = part or check.start(sys.executable, "logits", "resnet_jax")
        try:
            answer = part.within(ends - time.monotonic(), f"logits {name} {dtype}")
        except TooLateError:
            break
        except LeftOutError as error:
            answer = {"error": str(error)}
            part.close()
            part = None
        result = compared(name, dtype, answer, check.golden[name])
        check.logits[name, dtype] = result
        _progress(f"logits of {name} in {dtype}: {_error_cell(result)}")
    if part:
        part.close()


def report_logits(check: Check) -> list[str]:
    """Prints how far the logits differ; returns a sentence for each failure."""
    output.say("| logits of | kind | float32 error (bound) | bfloat16 error (bound) |")
    output.say("|---|---|---|---|")
    for name in check.args.networks:
        cells = [_error_cell(check.logits[name, dtype]) for dtype in BOUNDS]
        output.say(f"| {name} | {NETWORKS.get(name, '')} | {' | '.join(cells)} |")
    output.say("")
    failures = []
    for (name, dtype), result in check.logits.items():
        what = f"logits of {name} in {dtype}"
        if result is None:
            check.leave_out(what, "no time was left")
        elif result["failure"]:
            failures.append(f"The {what} failed: {result['failure']}")
        elif not result["equal"]:
            failures.append(f"The {what} differ from the golden figures")
    return failures


def compared(name: str, dtype: str, answer: dict, golden: list[float]) -> dict:
    """Returns what the report says of a network's logits."""
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
    told = f"{result['error']:.1e} ({result['bound']:g})"
    return told if result["equal"] else f"DIFFERS: {told}"


# The train step.


def compare_steps(
    check: Check, image_size: int, batch_size: int, steps: int
) -> list[str]:
    """Measures the train step of each framework; returns a sentence for a failure."""
    case = (check.args.model, image_size, batch_size, check.args.dtype)
    name = f"train step of {name_of(*case)}"
    ours = next(iter(MAKERS))
    parts: dict[str, Part] = {}
    measured: dict[str, dict[str, list[float]]] = {}
    reasons: dict[str, str] = {}
    failures: list[str] = []

    def ask(who: str, line: str):
        """Returns an answer; None where a framework fails, which is then left out."""
        try:
            return parts[who].within(check.left(), line)
        except LeftOutError as error:
            parts.pop(who).close()
            reasons[who] = str(error)
            measured.pop(who, None)
            check.leave_out(f"{name}: {who}", str(error))
            if who == ours and not isinstance(error, TooLateError):
                failures.append(f"The {name} failed: {error}")
            return None

    try:
        for who in MAKERS:
            python = check.args.torch if who.startswith("torch") else sys.executable
            platform = check.report["device"]["platform"]
            parts[who] = check.start(python, "step", who, *case, platform)
            seconds = ask(who, "start")
            if seconds is None or ask(who, f"steps {WARM_UP}") is None:
                continue
            _progress(f"{who}: first step after {seconds:.1f} s")
            measured[who] = {"start": [seconds], "seconds": []}
        for size in _rounds(steps):
            for who in list(measured):
                seconds = ask(who, f"steps {size}")
                if seconds is not None:
                    measured[who]["seconds"].append(seconds)
                    _progress(f"{who}: {1e3 * seconds:.1f} ms a step")
        for who in list(measured):
            peak = ask(who, "memory")
            if peak is not None:
                measured[who]["memory"] = [peak / 2**30]
        _report_steps(check, name, batch_size, measured, reasons)
        # Last, since a profiler that does not fit the driver may end the process.
        if ours in measured:
            try:
                line = f"kernels {PROFILED}"
                _report_kernels(check, parts[ours].within(check.left(), line))
            except LeftOutError as error:
                check.leave_out(f"kernels of the {name}", str(error))
    finally:
        for part in parts.values():
            part.close()
    return failures


def _rounds(steps: int) -> Iterator[int]:
    """Yields the number of steps of each round."""
    for i in range(min(ROUNDS, steps)):
        yield len(range(i, steps, ROUNDS))


def _report_steps(
    check: Check,
    name: str,
    batch_size: int,
    measured: dict[str, dict[str, list[float]]],
    reasons: dict[str, str],
) -> None:
    """Records and prints a row for each figure and peer."""
    check.report["rows"] = rows = []
    ours, *peers = MAKERS
    for what, unit, key, figure in (
        ("speed", "images/s", "seconds", lambda x: batch_size / x),
        ("time of a step", "ms", "seconds", lambda x: 1e3 * x),
        ("peak memory", "GiB", "memory", float),
        ("time until the first step has ended", "s", "start", float),
    ):
        title = f"{name}: {what}"
        values = {who: [*map(figure, found[key])] for who, found in measured.items()}
        for peer in peers:
            if ours in values:
                theirs, reason = values.get(peer, ()), reasons.get(peer, "")
                rows.append(table.row(title, unit, values[ours], peer, theirs, reason))
            elif peer in values:
                rows.append(table.row(f"{title}, {peer}", unit, values[peer]))
    check.write()
    if rows:
        lines = [table.HEAD, *map(table.as_markdown, rows)]
        output.say("\n".join(lines) + "\n")


def _report_kernels(check: Check, kernels: list[dict]) -> None:
    """Records and prints the kernels that take longest."""
    check.report["kernels"] = kernels
    check.write()
    output.say("| kernel | ms a step | of all kernels' time | calls a step |")
    output.say("|---|---|---|---|")
    for kernel in kernels:
        output.say(
            f"| {kernel['name'][:80].replace('|', '/')} | {kernel['ms_per_step']:.3f}"
            f" | {kernel['share']:.1%} | {kernel['calls_per_step']:g} |"
        )
    output.say("")


def _progress(text: str) -> None:
    output.note(text)
