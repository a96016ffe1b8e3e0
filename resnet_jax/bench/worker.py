"""Runs this library or a baseline in a process of its own, and times its calls.

The process prepares what it measures and then answers requests, so that several
implementations can take turns on the same cores. This file is also the program of that
process. It imports neither jax nor torch, since the process may have only one of them.
"""

import contextlib
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from resnet_jax.errors import ResNetJaxError, UserError

# For each task the implementations that are compared, this library first. Each is a
# function that takes model, image size, batch size and dtype, and returns the call to
# time.
IMPLEMENTATIONS = {
    "step": {
        "resnet_jax": "resnet_jax.bench.own_programs:step",
        "stock Linen": "resnet_jax.plan.stock_linen:step",
        "torch eager, channels_last": "resnet_jax.bench.torch_baseline:step",
    },
    "inference": {
        "resnet_jax": "resnet_jax.bench.own_programs:inference",
        "torch eager, channels_last": "resnet_jax.bench.torch_baseline:inference",
        "torch.compile, channels_last": (
            "resnet_jax.bench.torch_baseline:compiled_inference"
        ),
    },
    "compile": {
        "resnet_jax": "resnet_jax.bench.own_programs:compile_step",
        "stock Linen": "resnet_jax.plan.stock_linen:compile_step",
    },
    "compile scanned": {
        "scanned blocks": "resnet_jax.bench.own_programs:compile_scanned_step",
        "unrolled": "resnet_jax.bench.own_programs:compile_step",
    },
}
# Stock Linen runs on the default device, so no other devices may be visible.
ONE_CPU = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
# The minimum number of calls and of seconds for each request.
REQUESTS = {"once": (1, 0.0), "warm": (2, 0.0), "run": (1, 1.0)}


class LeftOutError(ResNetJaxError):
    """An implementation cannot run here; the message gives the reason."""


class Worker:
    """The parent's end of a process that runs one implementation.

    Each request is a line, which the process answers with a line of JSON.

    Attributes:
      module: The module that runs in the process.
      process: The process; None if it could not be started.

    Args:
      python: The path of the Python interpreter.
      task: A key of `IMPLEMENTATIONS`.
      implementation: The name of one of the task's implementations.
      case: Model, image size, batch size and dtype; see `cases.Case`.
      environment: Environment variables, in addition to those of this process.
    """

    module = "resnet_jax.bench.worker"
    process: subprocess.Popen | None

    def __init__(
        self,
        python: str,
        task: str,
        implementation: str,
        *case: str | int,
        **environment: str,
    ):
        command = [python, "-m", self.module, task, implementation]
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

    def ask(self, request: str) -> Any:
        """Returns the answer to a request, such as the seconds that a call took.

        Raises:
          LeftOutError: The process gives no answer; the message says why.
        """
        if not self.process:
            raise LeftOutError(self.failure)
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            print(request, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise LeftOutError(f"it ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, str):
            self.close()
            raise LeftOutError(answer)
        return answer

    def close(self) -> None:
        """Ends the process, if it was started."""
        if self.process:
            self.process.communicate()


# The functions below run in the worker process.


def open_answers() -> Callable[[Any], None]:
    """Reserves standard output for answers.

    Returns:
      A function that writes an answer, any value that JSON can hold. A string is the
      reason why there will be no more answers.
    """
    stdout = os.dup(1)
    # Libraries also print to standard output, which must not be taken for an answer.
    os.dup2(2, 1)

    def answer(value: Any) -> None:
        text = json.dumps(value).encode() + b"\n"
        while text:
            text = text[os.write(stdout, text) :]

    return answer


def main(argv: list[str]) -> None:
    """Answers the requests of a `Worker` with the seconds that a call takes.

    A request is a key of `REQUESTS`, or `profile DIR`, which writes a trace of a call.
    """
    task, implementation, model, size, batch, dtype = argv[1:]
    answer = open_answers()
    try:
        make = pkgutil.resolve_name(IMPLEMENTATIONS[task][implementation])
        run = make(model, int(size), int(batch), dtype)
    except ModuleNotFoundError as error:
        answer(f"{error.name} is not installed")
        return
    except (ImportError, LookupError, UserError) as error:
        answer(str(error).strip("'."))
        return
    for line in sys.stdin:
        request, _, folder = line.strip().partition(" ")
        if request == "profile":
            profiler_trace = importlib.import_module("resnet_jax.bench.profiler_trace")
            profiler_trace.profile(run, folder)
            answer(0.0)
        else:
            answer(seconds_of_call(run, *REQUESTS[request]))


def seconds_of_call(
    run: Callable[[], Any],
    calls: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Calls a function repeatedly and returns the mean duration of a call in seconds.

    Args:
      run: The function that is timed.
      calls: The minimum number of calls.
      seconds: The minimum duration of all calls together.
      clock: The clock, in seconds.
    """
    started, calls_made, passed = clock(), 0, 0.0
    while calls_made < calls or passed < seconds:
        run()
        calls_made, passed = calls_made + 1, clock() - started
    return passed / calls_made


if __name__ == "__main__":
    main(sys.argv)
