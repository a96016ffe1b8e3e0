"""Runs in the processes of `bench gpu`: logits, or one framework's train step.

A process imports only what its task needs: the interpreter of torch may have no JAX,
and a bare machine lacks Grain, tfds and ml_collections.
"""

import collections
import dataclasses
import importlib
import pathlib
import resource
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

from resnet_jax.bench.worker import open_answers
from resnet_jax.errors import UserError

# The recipes' statistics of ImageNet. Their values do not change the speed.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Steps:
    """A compiled train step and the state that it trains.

    Attributes:
      call: Starts a step; it may return before the step has ended.
      wait: Waits until all started steps have ended.
      peak: Returns the peak of the device memory in use, in bytes; on a CPU, of the
        process's memory.
    """

    call: Callable[[], Any]
    wait: Callable[[], Any]
    peak: Callable[[], int]


# A function that makes the step of a model, image size, batch size and dtype. The
# functions that return a maker import what it needs and start the device, so that
# neither is timed.
Maker = Callable[[str, int, int, str], Steps]


def this_library(platform: str) -> Maker:
    """Returns the maker of the step that `main` compiles.

    The optimizer is that of the baselines.

    Args:
      platform: JAX's name of the platform, such as `gpu` or `cpu`.
    """
    _stand_in_for_ml_collections()
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from resnet_jax import compiler
    from resnet_jax.kernels import platforms
    from resnet_jax.models import create_model
    from resnet_jax.parallel import process_memory
    from resnet_jax.plan import stock_linen
    from resnet_jax.training import step

    process_memory.keep_freed_memory()
    device = jax.local_devices(backend=platform)[0]

    def make(model: str, size: int, batch: int, dtype: str) -> Steps:
        # As in the baselines, batch norm normalizes over the whole batch.
        network = create_model(model, dtype=jnp.dtype(dtype))
        optimizer = stock_linen.make_optimizer()
        options = step.StepOptions(mean=MEAN, std=STD)
        init = functools.partial(
            step.init_state, network, optimizer, seed=0, image_size=size, ema=False
        )
        rng = np.random.default_rng(0)
        placed = {
            "image": jnp.asarray(
                rng.integers(0, 256, (batch, size, size, 3), np.uint8)
            ),
            "label": jnp.asarray(rng.integers(10, size=batch), jnp.int32),
        }
        with process_memory.gc_paused(), platforms.target_platform(platform):
            like = jax.eval_shape(init)
            train_step = step.make_train_step(network, optimizer, options)
            lowered = jax.jit(train_step, donate_argnums=0).lower(like, placed)
        compiled = compiler.compile_step(lowered, device.device_kind, "chip")

        def next_state(state, batch):
            return compiled(state, batch)[0]

        return _jax_steps(next_state, stock_linen.make_state(like), placed)

    return make


def stock_linen(platform: str) -> Maker:
    """Returns the maker of the stock Linen step, for a platform of JAX."""
    import jax

    from resnet_jax.plan import stock_linen

    jax.local_devices(backend=platform)

    def make(model: str, size: int, batch: int, dtype: str) -> Steps:
        return _jax_steps(*stock_linen.compiled_step(model, size, batch, dtype))

    return make


def torchvision(platform: str) -> Maker:
    """Returns the maker of torch's eager step in channels_last with autocast.

    Args:
      platform: JAX's name of the platform, such as `gpu` or `cpu`.
    """
    import torch

    from resnet_jax.bench import torch_baseline

    device = "cuda" if platform == "gpu" else "cpu"
    if device == "cuda":
        torch.cuda.init()
        torch.backends.cudnn.benchmark = True

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def peak() -> int:
        on_gpu = device == "cuda"
        return torch.cuda.max_memory_allocated() if on_gpu else _peak_of_process()

    def make(model: str, size: int, batch: int, dtype: str) -> Steps:
        run = torch_baseline.step(model, size, batch, dtype, device)
        return Steps(call=run, wait=wait, peak=peak)

    return make


# All frameworks, this library first.
MAKERS: dict[str, Callable[[str], Maker]] = {
    "resnet_jax": this_library,
    "stock Linen": stock_linen,
    "torchvision, channels_last, AMP": torchvision,
}


def _stand_in_for_ml_collections() -> None:
    """Lets the modules of the step be imported where ml_collections is missing.

    They use its `ConfigDict` in annotations only, since a step is made without a
    config.
    """
    try:
        importlib.import_module("ml_collections")
    except ModuleNotFoundError:
        module: Any = types.ModuleType("ml_collections")
        module.ConfigDict, module.FieldReference = dict, object
        sys.modules["ml_collections"] = module


def _jax_steps(compiled: Callable, state: Any, batch: dict) -> Steps:
    import jax

    device = jax.local_devices()[0]

    def call() -> None:
        nonlocal state
        state = compiled(state, batch)

    def peak() -> int:
        stats = device.memory_stats() or {}
        return stats.get("peak_bytes_in_use") or _peak_of_process()

    return Steps(call=call, wait=lambda: jax.block_until_ready(state), peak=peak)


def _peak_of_process() -> int:
    # Linux gives the peak in KiB.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# The commands of a process. A request is the name of a command, then its arguments.


def logits_commands() -> dict[str, Callable]:
    """Returns the commands of a process that computes logits."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from resnet_jax.models import create_model, get_spec
    from tests.helpers import keyed

    def device() -> dict:
        first = jax.local_devices()[0]
        return {"platform": first.platform, "kind": first.device_kind}

    def logits(name: str, dtype: str) -> dict:
        spec = get_spec(name)
        image = keyed.images(1, keyed.sizes(spec)[0])
        network = create_model(name, dtype=jnp.dtype(dtype))
        # At the default precision, GPUs compute float32 convolutions in TF32.
        precision = "highest" if dtype == "float32" else None
        try:
            with jax.default_matmul_precision(precision):
                values = jax.jit(network.apply)(keyed.variables(spec), image)
            sample = keyed.golden_sample(np.asarray(values, np.float32))
        except Exception as error:
            # A network that fails is reported, and the others are still computed.
            return {"error": _reported(error)}
        return {"logits": sample.tolist()}

    return {"device": device, "logits": logits}


def step_commands(
    framework: str, model: str, size: str, batch: str, dtype: str, platform: str
) -> dict[str, Callable]:
    """Returns the commands of a process that runs one framework's train step.

    Args:
      framework: A key of `MAKERS`.
      model: The name of the network.
      size: The height and width of the images in pixels.
      batch: The number of images.
      dtype: The dtype of the computation.
      platform: JAX's name of the platform, such as `gpu` or `cpu`.
    """
    make = MAKERS[framework](platform)
    made: list[Steps] = []

    def start() -> float:
        started = time.perf_counter()
        try:
            made.append(make(model, int(size), int(batch), dtype))
        except LookupError as error:
            if type(error) is not LookupError:
                raise
            # The baseline lacks the network.
            raise UserError(*error.args) from None
        made[0].call()
        made[0].wait()
        return time.perf_counter() - started

    def steps(count: str) -> float:
        started = time.perf_counter()
        for _ in range(int(count)):
            made[0].call()
        made[0].wait()
        return (time.perf_counter() - started) / int(count)

    def kernels(count: str) -> list[dict]:
        import jax

        from resnet_jax.bench import profiler_trace

        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                steps(count)
            events = list(profiler_trace.read_operations(pathlib.Path(folder)))
        return costliest(events, int(count))

    return {
        "start": start,
        "steps": steps,
        "memory": lambda: made[0].peak(),
        "kernels": kernels,
    }


def costliest(events: list[tuple[str, float]], steps: int) -> list[dict]:
    """Returns the ten kernels that take longest.

    Args:
      events: The name and the seconds of every kernel that ran.
      steps: The number of steps that ran.

    Returns:
      For each kernel its `name`, `ms_per_step`, `calls_per_step` and `share` of the
      time of all kernels, the longest first.
    """
    durations: dict[str, list[float]] = collections.defaultdict(list)
    for name, duration in events:
        durations[name].append(duration)
    seconds = {name: sum(values) for name, values in durations.items()}
    total = sum(seconds.values())
    return [
        {
            "name": name,
            "ms_per_step": 1e3 * spent / steps,
            "calls_per_step": len(durations[name]) / steps,
            "share": spent / total,
        }
        for name, spent in sorted(seconds.items(), key=lambda item: -item[1])[:10]
    ]


def _reported(error: Exception) -> str:
    """Prints the traceback, and returns the error in one line."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def main(argv: list[str]) -> None:
    """Answers the requests of a `gpu.GPUWorker`, one line each."""
    answer = open_answers()
    task, framework, *case = argv[1:]
    try:
        if task == "step":
            commands = step_commands(framework, *case)
        else:
            commands = logits_commands()
        for line in sys.stdin:
            command, *words = line.split()
            answer(commands[command](*words))
    except ModuleNotFoundError as error:
        answer(f"{error.name} is not installed")
    except UserError as error:
        answer(str(error))
    except Exception as error:
        # For example, memory may run out. The parent reports it and measures the rest.
        answer(_reported(error))


if __name__ == "__main__":
    main(sys.argv)
