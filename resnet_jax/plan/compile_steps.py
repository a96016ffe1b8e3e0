"""What a compiler says of the steps of a config, on devices that need not be there.

`python -m resnet_jax.plan.compile_steps` reads a request from standard input and writes the
answer to standard output; `ask` makes such a process, since a compiler for TPUs wants
its environment before JAX is imported, and keeps what it has loaded.
"""

import ast
import collections
import json
import math
import re
import sys
import time
from collections.abc import Callable

import jax
import psutil
from jax.experimental import topologies
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax.compiler.chips import (
    CHIPS,
    chip_of,
    chip_of_device,
    sides_of,
    slices_of,
)
from resnet_jax.data.sources import KNOWN
from resnet_jax.errors import NO_MEMORY, UserError
from resnet_jax.models.cost import cost_of_image, count
from resnet_jax.parallel import sharding
from resnet_jax.plan import hlo
from resnet_jax.training.experiment import VIEWS, Setup, set_up

# How XLA tells that a program does not fit, and how much it wanted of how much.
WANTED = re.compile(
    r"(?:Used |\()([\d.]+)([KMGT]?)\)?(?: of | exceeds available HBM \()"
    r"([\d.]+)([KMGT]?)"
)
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def facts(
    config: ConfigDict, topology: str, per_chip: int = 0, evaluation: bool = True
) -> dict:
    """What follows from a config on a topology, and what its compiler says.

    Where images grow during a run, its steps are those of the last size; of what is
    evaluated, only the split is considered (not `evaluate.sets`).

    Args:
      config: see `resnet_jax/config/defaults.py`; data sets of `KNOWN` need not be
        there.
      topology: `local`, or as `v5e:2x4` or `2*v5e:2x4`; TPUs need libtpu, and no TPU.
      per_chip, evaluation: see `ask.ask`.

    Returns:
      `devices`, `chips`, `hosts`, `slices` (counts), `chip` (of `CHIPS`, or ''),
      `kind`, `memory` (bytes of a device), of the run `params`, `macs` (of one image's
      forward pass), `batch_size`, `steps`, `train_images`, `eval_images`,
      `eval_batch_size`, `evaluations`, and `train` and `eval`: see `of_step`.

    Raises:
      UserError: the config or the topology cannot be.
    """
    devices = devices_of(topology)
    where = where_of(topology, devices)
    config = stand_in(config)
    config.batch_size = per_chip * where["chips"] or config.batch_size
    setup = set_up(config, sharding.make_mesh(devices))
    state = setup.state_like()
    parts = {
        "parameters": state.params,
        "statistics": state.batch_stats,
        "optimiser": state.opt_state,
        "average": state.ema,
    }
    teacher = setup.teacher_like()
    batch = setup.batch_like(config.batch_size, "image", "label")
    run = _run(setup)
    forward = 2 * run["macs"] / where["devices"]
    # Forward and the gradients by input and kernel; SAM does so twice.
    passes = 6 if config.optim.sam_rho else 3
    train = of_step(
        lambda: setup.compile(setup.lower_train_step(teacher)),
        parts | {"teacher": teacher},
        batch,
        setup.mesh,
        passes * forward * config.batch_size,
    )
    found = where | run | {"train": train}
    if evaluation:
        keys = "image", "label", "mask"
        batch = setup.batch_like(setup.eval_batch_size, *keys, examples=setup.test)
        evaluated = {"parameters": state.params, "statistics": state.batch_stats}
        step = setup.compile_eval_step
        views = VIEWS[config.evaluate.views]
        least = views * forward * setup.eval_batch_size
        found["eval"] = of_step(step, evaluated, batch, setup.mesh, least)
    return found


def devices_of(topology: str) -> list:
    """The devices of a topology; those of TPUs are only described."""
    name = chip_of(topology)
    if not name:
        return sharding.find_devices()
    chip = CHIPS[name]
    options = {"chip_config_name": chip.config}
    sides = sides_of(topology)
    if math.prod(sides) <= chip.host:
        options["chips_per_host_bounds"] = (*sides, 1)[:3]
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology.rpartition("*")[2],
            num_slices=slices_of(topology),
            **options,
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"libtpu knows no topology {topology} ({reason}); take a shape in which"
            f" {name} is sold, see {chip.source.partition(';')[0]}."
        ) from None
    return list(found.devices)


def where_of(topology: str, devices: list) -> dict:
    """The part of `facts` that is of the devices alone."""
    first = devices[0]
    # Chips of different slices have the same coordinates.
    at = {
        (sharding.slice_of(device), *getattr(device, "coords", (device.id,)))
        for device in devices
    }
    hosts = len({device.process_index for device in devices})
    name = chip_of(topology) or chip_of_device(first.device_kind)
    if name:
        memory = CHIPS[name].hbm * len(at) // len(devices)
    else:
        # The devices of a CPU share its memory.
        stats = first.memory_stats() or {}
        shared = psutil.virtual_memory().total // len(devices)
        memory = stats.get("bytes_limit", shared)
    return {
        "topology": topology,
        "kind": first.device_kind,
        "chip": name,
        "devices": len(devices),
        "chips": len(at),
        "hosts": hosts,
        "slices": len({slice_ for slice_, *_ in at}),
        "memory": memory,
    }


def _run(setup: Setup) -> dict:
    config, model = setup.config, setup.model
    return {
        "model": config.model.name,
        "dtype": config.model.dtype,
        "sharding": config.sharding.params,
        "image_size": config.data.image_size,
        "batch_size": config.batch_size,
        "eval_batch_size": setup.eval_batch_size,
        "params": count(setup.state_like().params),
        "macs": cost_of_image(model, config.data.image_size).macs,
        "steps": setup.total_steps,
        "train_images": len(setup.train.source),
        "eval_images": len(setup.test.source),
        "evaluations": sum(
            setup.due("evaluate", step) for step in range(1, setup.total_steps + 1)
        ),
    }


def stand_in(config: ConfigDict) -> ConfigDict:
    """The config with noise in place of data of known size, and nothing in memory."""
    config = ConfigDict(config.to_dict())
    data = config.data
    with config.ignore_type():
        config.evaluate.sets, data.cache = (), "none"
        for source, key, split in (
            (data.eval_source or data.source, "eval_source", data.eval_split),
            (data.source, "source", data.train_split),
        ):
            classes, sizes = KNOWN.get(source, (0, {}))
            name = re.match(r"\w*", split)[0]
            if name in sizes:
                data[key] = f"fake:{classes}:{sizes[name]}"
    return config


def of_step(
    step: Callable[[], jax.stages.Compiled],
    parts: dict,
    batch: dict,
    mesh: Mesh,
    least: float = 0.0,
) -> dict:
    """What the compiler says of a step.

    Args:
      step: compiles it.
      parts: trees of shapes with their shardings, by what they are.
      batch: as these.
      mesh: of the devices.
      least: operations of a device that the network's MACs are, for programs with
        loops, whose operations compilers count once.

    Returns:
      `seconds` of compiling, and either `wanted` and `limit` (bytes of a device,
      where told), if the program does not fit, or `memory` (bytes of a device by
      part), of a device `flops`, `bytes` (read and written), `hbm_bytes` (of these,
      in its main memory) and `cycles` (0 where the compiler does not tell), and
      `collectives`.

    Raises:
      UserError: the compiler cannot tell what it made.
    """
    started = time.perf_counter()
    try:
        compiled = step()
    except jax.errors.JaxRuntimeError as error:
        if NO_MEMORY not in str(error):
            raise
        numbers = WANTED.search(str(error))
        wanted, limit = _amounts(numbers) if numbers else (0, 0)
        seconds = time.perf_counter() - started
        return {"wanted": wanted, "limit": limit, "seconds": seconds}
    seconds = time.perf_counter() - started
    stats, cost = compiled.memory_analysis(), compiled.cost_analysis()
    memory = {name: _bytes(tree) for name, tree in parts.items() if _bytes(tree)}
    memory["batch"] = _bytes(batch)
    memory["padding"] = max(stats.argument_size_in_bytes - sum(memory.values()), 0)
    memory["results"] = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory["activations"] = stats.temp_size_in_bytes
    memory["program"] = stats.generated_code_size_in_bytes
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"This compiler cannot tell what it made ({str(error).splitlines()[0]});"
            " take a newer jax, which for TPU7x is 0.12 on Python 3.12."
        ) from None
    flops = cost.get("flops", 0.0)
    try:
        found = collections.Counter(hlo.collectives(text))
        read = {
            "flops": max(flops, least) if hlo.repeats_products(text) else flops,
            "bytes": cost.get("bytes accessed", 0.0) + hlo.repeated_bytes(text),
            "hbm_bytes": hlo.hbm_bytes(text),
            "cycles": hlo.estimated_cycles(text),
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # The text is what another program wrote, in a form of its own.
        raise UserError(
            "plan cannot read the program that this compiler made"
            f" ({type(error).__name__}: {str(error)[:200]}). It reads those of libtpu"
            " 0.0.30 to 0.0.52; install one of these."
        ) from None
    return {
        "seconds": seconds,
        "memory": memory,
        **read,
        "collectives": [
            {
                "kind": one.kind,
                "bytes": one.bytes,
                "devices": one.devices or mesh.size,
                "slices": one.slices,
                "times": one.times * number,
            }
            for one, number in found.items()
        ],
    }


def _bytes(tree) -> int:
    """What a device holds of a tree."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _amounts(numbers: re.Match) -> tuple[int, int]:
    wanted, unit, limit, limits_unit = numbers.groups()
    return int(float(wanted) * UNITS[unit]), int(float(limit) * UNITS[limits_unit])


def main() -> None:
    """Answers one request: the arguments of `facts` as a dictionary of literals."""
    # Whatever else is printed must not mix with the answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    request = ast.literal_eval(sys.stdin.read())
    try:
        found = facts(**request | {"config": ConfigDict(request["config"])})
    except UserError as error:
        found = {"error": str(error)}
    print(json.dumps(found), file=answer)


if __name__ == "__main__":
    main()
