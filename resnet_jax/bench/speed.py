"""Speed of a train step and of inference, against stock Linen and torch.

Every contender is a process of its own, which compiles and warms up first; then they
run in turn, a call at a time, on the same cores.
"""

import argparse
import collections
import importlib.metadata
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax import host
from resnet_jax.bench import peers
from resnet_jax.models import create_model
from resnet_jax.models.cost import init_shapes

STEP = ("stock Linen", "torch eager")
INFERENCE = ("torch eager inference", "torch.compile inference")


def rows(
    what: str,
    model: str,
    image_size: int,
    batch_sizes: list[int],
    dtypes: list[str],
    repeats: int,
    torch_python: str = sys.executable,
    profile: pathlib.Path | None = None,
) -> Iterator[dict]:
    """One row a peer, batch size and type; see the package's docstring.

    Args:
      what: `step` or `inference`.
      model: of the zoo; torch's is torchvision's of that name, or the CIFAR network.
      image_size: side of the images.
      batch_sizes: images a call.
      dtypes: of the computation; bfloat16 is autocast in torch.
      repeats: calls of each contender.
      torch_python: the interpreter that has torch.
      profile: writes a trace of the step there, and prints what takes longest.
    """
    print(_machine(), file=sys.stderr, flush=True)
    for batch in batch_sizes:
        for dtype in dtypes:
            yield from _compare(
                what, model, image_size, batch, dtype, repeats, torch_python, profile
            )


def _compare(what, model, size, batch, dtype, repeats, torch_python, profile):
    ours = f"ours {what}"
    children = {}
    for who in (ours, *(STEP if what == "step" else INFERENCE)):
        python = torch_python if who.startswith("torch") else sys.executable
        child = _Child(python, who, model, size, batch, dtype)
        if child.ask("warm") is None:
            print(f"{who} did not run and is left out.", file=sys.stderr, flush=True)
        else:
            children[who] = child
    if ours not in children:
        return
    found: dict[str, list[float]] = {who: [] for who in children}
    for _ in range(repeats):
        for who, child in children.items():
            found[who].append(batch / float(child.ask("run")))
            print(f"{who}: {found[who][-1]:.2f}", file=sys.stderr, flush=True)
    if profile:
        children[ours].ask(f"profile {profile}")
    for child in children.values():
        child.close()
    median = {who: statistics.median(rates) for who, rates in found.items()}
    spread = {who: [min(rates), max(rates)] for who, rates in found.items()}
    for peer in [who for who in children if who != ours] or [""]:
        yield {
            "name": f"{what} {model} {size} px batch {batch} {dtype}",
            "value": median[ours],
            "unit": "images/s",
            "peer": peer,
            "peer_value": median.get(peer),
            "ratio": median[ours] / median[peer] if peer else None,
            "spread": {who: spread[who] for who in (ours, peer) if who},
        }


def _machine() -> str:
    names = ("jax", "jaxlib", "flax")
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names]
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    model = "CPU"
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        match = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        model = match[1] if match else model
    return f"{model}, {cores} cores, load {load:.1f}; {', '.join(versions)}"


class _Child:
    """A contender's process, which answers a line with a line."""

    def __init__(self, python: str, who: str, *arguments):
        command = [python, "-m", "resnet_jax.bench.speed", who, *map(str, arguments)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )

    def ask(self, line: str) -> str | None:
        """The answer; None if the process has ended."""
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            return None
        return self.process.stdout.readline().strip() or None

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


# In a contender's process.


def our_step(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """The train step that `main` runs, of a config for images of that size."""
    from resnet_jax.bench.training import training_config
    from resnet_jax.setup import set_up

    config = "configs/r50.py" if size >= 96 else "configs/cifar10.py"
    arguments = argparse.Namespace(
        config=config,
        model=model,
        batch_size=batch,
        dtype=dtype,
        image_size=size,
        steps=4,
    )
    config = training_config(arguments)
    # As the peers have it.
    config.model.bn_group_size = "global"
    setup = set_up(config)
    train_step = setup.compile_train_step()
    state = setup.init_state()
    rng = np.random.default_rng(0)
    like = setup.batch_like(batch, "image", "label")
    placed = setup.to_devices(
        {
            "image": rng.integers(0, 256, like["image"].shape, np.uint8),
            "label": rng.integers(0, 10, like["label"].shape, np.int32),
        }
    )

    def run() -> None:
        nonlocal state
        state, _ = train_step(state, placed)
        jax.block_until_ready(state)

    return run


def our_inference(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """Logits of float32 images."""
    network = create_model(model, dtype=jnp.dtype(dtype))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.01, 0.02, x.shape), x.dtype),
        init_shapes(network, size),
    )
    shape = (batch, size, size, network.spec.in_channels)
    image = jnp.asarray(rng.standard_normal(shape, np.float32))
    logits_of = jax.jit(network.apply).lower(variables, image).compile()
    return lambda: jax.block_until_ready(logits_of(variables, image))


def costliest(trace: pathlib.Path, count: int = 10) -> list[tuple[str, float]]:
    """The operations of the newest trace in a folder that take longest, in seconds."""
    files = sorted(trace.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    seconds: collections.Counter[str] = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation:
                    seconds[operation] += event.duration_ns / 1e9
    return seconds.most_common(count)


def contender(who: str, model: str, size: int, batch: int, dtype: str):
    """What a contender calls; it may raise ImportError or LookupError."""
    arguments = model, size, batch, dtype
    if who.startswith("ours"):
        host.keep_freed_memory()
    if who.startswith("torch."):
        return peers.torch_inference(*arguments, compiled=True)
    return {
        "ours step": our_step,
        "ours inference": our_inference,
        "stock Linen": peers.linen_step,
        "torch eager": peers.torch_step,
        "torch eager inference": lambda *a: peers.torch_inference(*a, compiled=False),
    }[who](*arguments)


def main(argv: list[str]) -> None:
    """Answers each line of the input with the seconds of a call; see `_Child`."""
    who, model, size, batch, dtype = argv[1:]
    answers = os.dup(1)
    # What libraries print must not be taken for an answer.
    os.dup2(2, 1)
    run = contender(who, model, int(size), int(batch), dtype)
    for line in sys.stdin:
        verb, _, argument = line.strip().partition(" ")
        started = time.perf_counter()
        if verb == "profile":
            with jax.profiler.trace(argument):
                run()
            for name, seconds in costliest(pathlib.Path(argument)):
                print(f"{seconds:8.3f} s  {name}", file=sys.stderr)
        else:
            run()
            if verb == "warm":
                run()
        os.write(answers, f"{time.perf_counter() - started}\n".encode())


if __name__ == "__main__":
    try:
        main(sys.argv)
    except (ImportError, LookupError) as error:
        sys.exit(f"{sys.argv[1]}: {type(error).__name__}: {error}")
