"""Compiles the steps of a config for devices that need not exist, and reads figures.

The figures are the compiler's: memory, operations, bytes, cycles and collectives.
`python -m resnet_jax.plan.compile_steps` reads a request from standard input and writes
the figures to standard output. `compile_subprocess` starts such a process.
"""

import ast
import collections
import json
import math
import re
import sys
import time
from collections.abc import Callable
from typing import Any

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
from resnet_jax.training import programs
from resnet_jax.training.datasets import resolve_splits
from resnet_jax.training.experiment import Experiment, set_up
from resnet_jax.training.validate import VIEWS

# XLA's message that a program does not fit: the memory that it needs and that exists.
NEEDED = re.compile(
    r"(?:Used |\()([\d.]+)([KMGT]?)\)?(?: of | exceeds available HBM \()"
    r"([\d.]+)([KMGT]?)"
)
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def facts(
    config: ConfigDict, topology: str, per_chip: int = 0, evaluation: bool = True
) -> dict:
    """Returns the compiler's figures for a config on a topology.

    If images grow during a run, all its steps are taken to have the last size, and if
    frozen parameters thaw, all steps are taken to train them. Only the eval split is
    evaluated, not `evaluate.sets`.

    Args:
      config: The run's configuration (`resnet_jax/config/defaults.py`). Data sets of
        `KNOWN` need not be on disk.
      topology: The devices: `local`, or a TPU topology such as `v5e:2x4` or
        `2*v5e:2x4`, which needs libtpu but no TPU.
      per_chip: Images per step and chip. 0 takes `config.batch_size`.
      evaluation: Also compiles the evaluation step.

    Returns:
      A dictionary of the facts of the topology (see `facts_of_topology`); the facts of
      the run: `model`, `dtype`, `sharding`, `image_size`, `params`, `macs` (of the
      forward pass of one image), `batch_size`, `eval_batch_size`, `steps`,
      `train_images`, `eval_images` and `evaluations`; and `train` and `eval`, the
      figures of both steps (see `figures_of_step`).

    Raises:
      UserError: The config or the topology is not valid.
    """
    devices = devices_of(topology)
    topology_facts = facts_of_topology(topology, devices)
    config = stand_in(config)
    config.batch_size = per_chip * topology_facts["chips"] or config.batch_size
    setup = set_up(config, sharding.make_mesh(devices))
    last = setup.total_steps - 1
    state = programs.state_like(setup, last)
    parts = {
        "parameters": state.params,
        "statistics": state.batch_stats,
        "optimiser": state.opt_state,
        "average": state.ema,
    }
    teacher = programs.teacher_like(setup)
    batch = programs.train_batch_like(setup)
    run = _run(setup)
    forward = 2 * run["macs"] / topology_facts["devices"]
    # The forward pass, the gradients of the inputs and those of the kernels take the
    # same number of operations. SAM computes all three twice.
    passes = 6 if config.optim.sam_rho else 3
    # The gradients of what is frozen are not computed, but those of the images may be.
    if setup.frozen(last).leaves:
        passes //= 3
    train = figures_of_step(
        lambda: programs.compile_lowered(
            setup, programs.lower_train_step(setup, teacher, number=last)
        ),
        parts | {"teacher": teacher},
        batch,
        setup.mesh,
        passes * forward * config.batch_size,
    )
    figures = topology_facts | run | {"train": train}
    if evaluation:
        batch = programs.eval_batch_like(setup)
        evaluated = {"parameters": state.params, "statistics": state.batch_stats}
        views = VIEWS[config.evaluate.views]
        least = views * forward * setup.eval_batch_size
        figures["eval"] = figures_of_step(
            lambda: programs.compile_eval_step(setup),
            evaluated,
            batch,
            setup.mesh,
            least,
        )
    return figures


def devices_of(topology: str) -> list:
    """Returns the devices of a topology; for TPUs, descriptions of devices."""
    name = chip_of(topology)
    if not name:
        return sharding.find_devices()
    chip = CHIPS[name]
    options: dict[str, Any] = {"chip_config_name": chip.config}
    sides = sides_of(topology)
    if math.prod(sides) <= chip.host:
        options["chips_per_host_bounds"] = (*sides, 1)[:3]
    try:
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=topology.rpartition("*")[2],
            num_slices=slices_of(topology),
            **options,
        )
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"libtpu does not know the topology {topology} ({reason}). Take a shape in"
            f" which {name} is sold (see {chip.source.partition(';')[0]})."
        ) from None
    return list(description.devices)


def facts_of_topology(topology: str, devices: list) -> dict:
    """Returns the facts of a topology.

    Returns:
      The `topology`, the numbers of `devices`, `chips`, `hosts` and `slices`, the
      devices' `kind`, the `chip` (a key of `CHIPS`, or "" if unknown), and the `memory`
      of a device in bytes.
    """
    first = devices[0]
    # Chips of different slices have the same coordinates.
    chips = {
        (sharding.slice_of(device), *getattr(device, "coords", (device.id,)))
        for device in devices
    }
    hosts = len({device.process_index for device in devices})
    name = chip_of(topology) or chip_of_device(first.device_kind)
    if name:
        memory = CHIPS[name].hbm * len(chips) // len(devices)
    else:
        # All devices of a CPU share its memory.
        stats = first.memory_stats() or {}
        shared = psutil.virtual_memory().total // len(devices)
        memory = stats.get("bytes_limit", shared)
    return {
        "topology": topology,
        "kind": first.device_kind,
        "chip": name,
        "devices": len(devices),
        "chips": len(chips),
        "hosts": hosts,
        "slices": len({slice_ for slice_, *_ in chips}),
        "memory": memory,
    }


def _run(setup: Experiment) -> dict:
    """Returns the facts of a run that do not depend on a compiler."""
    config, model = setup.config, setup.model
    return {
        "model": config.model.name,
        "dtype": config.model.dtype,
        "sharding": config.sharding.params,
        "image_size": config.data.image_size,
        "batch_size": config.batch_size,
        "eval_batch_size": setup.eval_batch_size,
        "params": count(programs.state_like(setup).params),
        "macs": cost_of_image(model, config.data.image_size).macs,
        "steps": setup.total_steps,
        "train_images": len(setup.train.source),
        "eval_images": len(setup.eval.source),
        "evaluations": sum(
            setup.is_due("evaluate", step) for step in range(1, setup.total_steps + 1)
        ),
    }


def stand_in(config: ConfigDict) -> ConfigDict:
    """Replaces data sets of known size by noise, so that they need not be on disk.

    Args:
      config: The run's configuration, which is not changed.

    Returns:
      A copy of the config without a data cache and without `evaluate.sets`.
    """
    config = ConfigDict(resolve_splits(config).to_dict())
    data = config.data
    with config.ignore_type():
        config.evaluate.sets, data.cache = (), "none"
        for source, key, split in (
            (data.eval_source or data.source, "eval_source", data.eval_split),
            (data.source, "source", data.train_split),
        ):
            classes, sizes = KNOWN.get(source, (0, {}))
            name = re.split(r"\W", split, maxsplit=1)[0]
            if name in sizes:
                data[key] = f"fake:{classes}:{sizes[name]}"
    return config


def figures_of_step(
    step: Callable[[], jax.stages.Compiled],
    parts: dict,
    batch: dict,
    mesh: Mesh,
    least: float = 0.0,
) -> dict:
    """Compiles a step and returns the compiler's figures for it.

    Args:
      step: Returns the compiled step.
      parts: Trees of `jax.ShapeDtypeStruct` with shardings, by the name of the part.
      batch: The batch, as such a tree.
      mesh: The mesh of the devices.
      least: Operations per device that the network's MACs amount to. Compilers count
        the operations of a loop's body once, so this is the minimum for such a program.

    Returns:
      `seconds` (of compiling). If the program does not fit, `wanted` and `limit`: bytes
      of a device that it needs and that exist, or 0 if the compiler does not say. If it
      fits, per device: `memory` (bytes by part), `flops`, `bytes` (read and written),
      `hbm_bytes` (those of the main memory), `cycles` (0 if the compiler does not
      estimate them) and `collectives`.

    Raises:
      UserError: The compiler does not give the program's text, or the text has a form
        that cannot be read.
    """
    started = time.perf_counter()
    try:
        compiled = step()
    except jax.errors.JaxRuntimeError as error:
        if NO_MEMORY not in str(error):
            raise
        numbers = NEEDED.search(str(error))
        needed, limit = _amounts(numbers) if numbers else (0, 0)
        seconds = time.perf_counter() - started
        return {"wanted": needed, "limit": limit, "seconds": seconds}
    seconds = time.perf_counter() - started
    # Any: JAX says that a backend may have no analysis, which these backends have.
    stats: Any = compiled.memory_analysis()
    cost: Any = compiled.cost_analysis()
    memory = {name: _bytes(tree) for name, tree in parts.items() if _bytes(tree)}
    memory["batch"] = _bytes(batch)
    memory["padding"] = max(stats.argument_size_in_bytes - sum(memory.values()), 0)
    memory["results"] = stats.output_size_in_bytes - stats.alias_size_in_bytes
    memory["activations"] = stats.temp_size_in_bytes
    memory["program"] = stats.generated_code_size_in_bytes
    try:
        text = compiled.as_text() or ""
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            "This compiler does not give the text of its program"
            f" ({str(error).splitlines()[0]}). Install a newer jax: for TPU7x, 0.12 on"
            " Python 3.12."
        ) from None
    flops = cost.get("flops", 0.0)
    try:
        collectives = collections.Counter(hlo.collectives(text))
        figures = {
            "flops": max(flops, least) if hlo.repeats_products(text) else flops,
            "bytes": cost.get("bytes accessed", 0.0) + hlo.repeated_bytes(text),
            "hbm_bytes": hlo.hbm_bytes(text),
            "cycles": hlo.estimated_cycles(text),
        }
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # The format of the text belongs to the compiler, and may change.
        raise UserError(
            "plan cannot read the program that this compiler wrote"
            f" ({type(error).__name__}: {str(error)[:200]}). It reads programs of"
            " libtpu 0.0.30 to 0.0.52; install one of these versions."
        ) from None
    return {
        "seconds": seconds,
        "memory": memory,
        **figures,
        "collectives": [
            {
                "kind": collective.kind,
                "bytes": collective.bytes,
                "devices": collective.devices or mesh.size,
                "slices": collective.slices,
                "times": collective.times * number,
            }
            for collective, number in collectives.items()
        ],
    }


def _bytes(tree) -> int:
    """Returns the bytes of a tree that each device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _amounts(numbers: re.Match) -> tuple[int, int]:
    """Returns the bytes that a match of `NEEDED` names."""
    needed, unit, limit, limits_unit = numbers.groups()
    return int(float(needed) * UNITS[unit]), int(float(limit) * UNITS[limits_unit])


def main() -> None:
    """Answers one request: the arguments of `facts`, as the literal of a dictionary."""
    # Libraries may print to standard output, which must hold only the answer.
    answer, sys.stdout = sys.stdout, sys.stderr
    request = ast.literal_eval(sys.stdin.read())
    try:
        reply = facts(**request | {"config": ConfigDict(request["config"])})
    except UserError as error:
        reply = {"error": str(error)}
    print(json.dumps(reply), file=answer)


if __name__ == "__main__":
    main()
