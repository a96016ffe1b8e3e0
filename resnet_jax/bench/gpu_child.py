"""The processes of `bench gpu`: logits of networks, and one framework's train step.

Nothing is imported but what the task needs: the interpreter of torch may have no JAX,
and a bare machine has no Grain, tfds and ml_collections.
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

from resnet_jax.bench.baseline import answers
from resnet_jax.errors import UserError

# ImageNet's statistics, as the recipes have them; their values do not change the speed.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Steps:
    """A compiled train step and the state that it trains.

    Attributes:
      call: Starts a step; it may return before the step has ended.
      wait: Returns when all steps that were started have ended.
      peak: Returns the most bytes of device memory that were in use; on a CPU, of the
        process's memory.
    """

    call: Callable[[], Any]
    wait: Callable[[], Any]
    peak: Callable[[], int]


# Makes the step of a model, image size, batch size and dtype. The functions that return
# one import what it needs and start the device, so that neither is timed.
Maker = Callable[[str, int, int, str], Steps]


def this_library(platform: str) -> Maker:
    """Returns the maker of the step that `main` compiles, with the peers' optimizer."""
    _stand_in_for_ml_collections()
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from resnet_jax import compiler
    from resnet_jax.kernels import platforms
    from resnet_jax.models import create_model
    from resnet_jax.parallel import process_memory
    from resnet_jax.plan import peer_linen
    from resnet_jax.training import step

    process_memory.keep_freed_memory()
    device = jax.local_devices(backend=platform)[0]

    def make(model: str, size: int, batch: int, dtype: str) -> Steps:
        # Batch statistics of the whole batch, as the peers have them.
        network = create_model(model, dtype=jnp.dtype(dtype))
        optimizer = peer_linen.make_optimizer()
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
        with process_memory.gc_paused(), platforms.known(platform):
            like = jax.eval_shape(init)
            train_step = step.make_train_step(network, optimizer, options)
            lowered = jax.jit(train_step, donate_argnums=0).lower(like, placed)
        compiled = compiler.compile_step(lowered, device.device_kind, "chip")

        def next_state(state, batch):
            return compiled(state, batch)[0]

        return _jax_steps(next_state, peer_linen.make_state(like), placed)

    return make


def stock_linen(platform: str) -> Maker:
    """Returns the maker of the step of `peer_linen`."""
    import jax

    from resnet_jax.plan import peer_linen

    jax.local_devices(backend=platform)

    def make(model: str, size: int, batch: int, dtype: str) -> Steps:
        return _jax_steps(*peer_linen.compiled_step(model, size, batch, dtype))

    return make


def torchvision(platform: str) -> Maker:
    """Returns the maker of the eager step of `peer_torch`: channels_last, autocast."""
    import torch

    from resnet_jax.bench import peer_torch

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
        run = peer_torch.step(model, size, batch, dtype, device)
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

    They only annotate with its `ConfigDict`; a step is made without a config.
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
    # Linux counts in KiB.
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# Commands: what a line of the input asks for, and the words behind it.


def logits_commands() -> dict[str, Callable]:
    """Returns the commands of the process that computes logits."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from resnet_jax.models import create_model, get_spec
    from tests.helpers import keyed

    def device() -> dict:
        found = jax.local_devices()[0]
        return {"platform": found.platform, "kind": found.device_kind}

    def logits(name: str, dtype: str) -> dict:
        spec = get_spec(name)
        image = keyed.images(1, keyed.sizes(spec)[0])
        network = create_model(name, dtype=jnp.dtype(dtype))
        # Otherwise GPUs compute with TF32 where float32 is asked for.
        precision = "highest" if dtype == "float32" else None
        try:
            with jax.default_matmul_precision(precision):
                found = jax.jit(network.apply)(keyed.variables(spec), image)
            sample = keyed.golden_sample(np.asarray(found, np.float32))
        except Exception as error:
            # One network that fails is reported; the others are still computed.
            return {"error": _reported(error)}
        return {"logits": sample.tolist()}

    return {"device": device, "logits": logits}


def step_commands(
    who: str, model: str, size: str, batch: str, dtype: str, platform: str
) -> dict[str, Callable]:
    """Returns the commands of the process of one framework's train step.

    Args:
      who: A key of `MAKERS`.
      model: The network.
      size: The height and width of the images.
      batch: The number of images.
      dtype: The type of the computation.
      platform: JAX's name of the platform, such as `gpu` or `cpu`.
    """
    make = MAKERS[who](platform)
    made: list[Steps] = []

    def start() -> float:
        started = time.perf_counter()
        try:
            made.append(make(model, int(size), int(batch), dtype))
        except LookupError as error:
            if type(error) is not LookupError:
                raise
            # A peer lacks the network.
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

        from resnet_jax.bench import traces

        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                steps(count)
            events = list(traces.events_of(pathlib.Path(folder)))
        return costliest(events, int(count))

    return {
        "start": start,
        "steps": steps,
        "memory": lambda: made[0].peak(),
        "kernels": kernels,
    }


def costliest(events: list[tuple[str, float]], steps: int) -> list[dict]:
    """Returns the ten kernels that take longest, with their part of all kernels' time.

    Args:
      events: The name and the seconds of every kernel that ran.
      steps: The number of steps that ran.
    """
    seconds, calls = collections.Counter(), collections.Counter()
    for name, duration in events:
        seconds[name] += duration
        calls[name] += 1
    total = seconds.total()
    return [
        {
            "name": name,
            "ms_per_step": 1e3 * spent / steps,
            "calls_per_step": calls[name] / steps,
            "share": spent / total,
        }
        for name, spent in seconds.most_common(10)
    ]


def _reported(error: Exception) -> str:
    """Prints the traceback; returns the error in one line."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def main(argv: list[str]) -> None:
    """Answers each line of the input; see `contender.Child`."""
    answer = answers()
    task, who, *case = argv[1:]
    try:
        commands = step_commands(who, *case) if task == "step" else logits_commands()
        for line in sys.stdin:
            verb, *words = line.split()
            answer(commands[verb](*words))
    except ModuleNotFoundError as error:
        answer(f"{error.name} is not installed")
    except UserError as error:
        answer(str(error))
    except Exception as error:
        # Such as too little memory: the command reports it and measures the rest.
        answer(_reported(error))


if __name__ == "__main__":
    main(sys.argv)
