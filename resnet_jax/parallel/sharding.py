"""The mesh of devices, and how arrays are placed on it.

The mesh has one axis, `data`. Batches are sharded along it, and parameters are
replicated or sharded (`PARAMS`).
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.console import output
from resnet_jax.errors import UserError, nearest_numbers
from resnet_jax.parallel import accelerators, process_memory

Tree = Any
# A `jax.Device`, or an object with the attributes of one that a mesh needs.
Device = Any

# Arrays of fewer elements are replicated. In float32 they take 64 KiB, which a link of
# a TPU (about 50 GB/s) transmits in the time that a message takes to arrive.
SMALL = 2**14

# The warnings about accelerators that were printed.
_warned: set[str] = set()


def find_devices(root: pathlib.Path = pathlib.Path("/")) -> list[jax.Device]:
    """Returns the devices of all processes.

    The lead process warns once if JAX chose CPUs although this machine has a GPU or a
    TPU.

    Args:
      root: The root of the file system, in which the kernel lists devices.

    Raises:
      UserError: JAX can use no devices.
    """
    try:
        with accelerators.hints_withheld() as hints:
            devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.values["jax_platforms"]
        platforms_text = f" of JAX_PLATFORMS={platforms}" if platforms else ""
        reason = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        # JAX's message is empty if a platform that it knows is not installed.
        reason = reason or "it is not installed"
        raise UserError(
            f"JAX can use no devices{platforms_text} ({reason}). Install jax[tpu] or"
            " jax[cuda13] for TPUs or GPUs, check that no other process holds them, or"
            " unset JAX_PLATFORMS to run on the devices that this machine has."
        ) from None
    chosen = jax.config.values["jax_platforms"]
    if devices[0].platform == "cpu" and not chosen and jax.process_index() == 0:
        _warn_about_accelerators(root, [hint.getMessage() for hint in hints])
    return devices


def prepare_memory() -> None:
    """Prepares this process's memory for its devices, which must not be in use yet.

    Without it, a tenth of the time of inference on CPUs is spent on taking memory from
    the system again and again.

    Raises:
      UserError: See `find_devices`.
    """
    # JAX starts threads when it is asked for its devices.
    process_memory.use_one_heap()
    if find_devices()[0].platform == "cpu":
        process_memory.keep_freed_memory()


def _warn_about_accelerators(root: pathlib.Path, hints: Sequence[str]) -> None:
    """Warns once about an unused accelerator, with our advice or with JAX's hints."""
    hidden = accelerators.hidden()
    advice = accelerators.advice(root, accelerators.installed(), hidden)
    for text in [advice] if advice else [] if hidden else hints:
        if text not in _warned:
            _warned.add(text)
            output.warn(text)


def make_mesh(devices: Sequence[Device] | None = None) -> Mesh:
    """Returns the mesh of all devices along one axis, `data`.

    Devices of one slice are in the order of `jax.make_mesh`, which rejects several
    slices. If there are several, the slices follow one another in the mesh, and the
    processes follow one another within each slice. So each process holds consecutive
    rows of a batch, and neighbours in the mesh are neighbours in the fast network.

    Args:
      devices: The devices, in any order; by default those of all processes.

    Raises:
      UserError: JAX can use no devices, or there are TPU slices of different sizes, for
        which libtpu cannot compile.
    """
    devices = find_devices() if devices is None else devices
    slices: dict[int, list[Device]] = {}
    for device in devices:
        slices.setdefault(slice_of(device), []).append(device)
    if len(slices) == 1:
        return _mesh_of_slice(devices)
    sizes = {index: len(slices[index]) for index in sorted(slices)}
    if devices[0].platform == "tpu" and len(set(sizes.values())) > 1:
        counts = ", ".join(f"slice {index} has {size}" for index, size in sizes.items())
        raise UserError(
            "A run on several TPU slices needs the same number of devices on each"
            f" ({counts}). Use slices of one topology."
        )
    ordered: list[Device] = []
    for index in sizes:
        # The order in which JAX lists the devices of a slice.
        own = sorted(slices[index], key=lambda x: (x.process_index, x.id))
        ordered += sorted(_mesh_of_slice(own).devices, key=lambda x: x.process_index)
    return Mesh(np.array(ordered), ("data",), axis_types=(AxisType.Auto,))


def _mesh_of_slice(devices: Sequence[Device]) -> Mesh:
    """Returns the mesh of the devices of one slice."""
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def slice_of(device: Device) -> int:
    """Returns the number of the slice of a device.

    The devices of a slice are connected by the fast network: it is a TPU slice, or an
    NVLink domain of GPUs, which is one node on most systems. JAX numbers slices only
    where there can be several; all CPU devices are one slice.
    """
    return getattr(device, "slice_index", None) or 0


def slice_count(mesh: Mesh) -> int:
    """Returns the number of slices whose devices are in the mesh."""
    return len({slice_of(device) for device in mesh.devices.flat})


def platform_of(mesh: Mesh) -> str:
    """Returns the platform of the mesh's devices: `cpu`, `gpu` or `tpu`."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with which every device holds the complete array."""
    return NamedSharding(mesh, P())


def fully_sharded(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """Returns the sharding that splits one axis of an array over all devices.

    It is the longest axis whose length the number of devices divides, and the first of
    equally long ones. Arrays with fewer than `SMALL` elements, or without such an axis,
    are replicated.

    Args:
      mesh: The mesh of the devices.
      shape: The shape of the array.
    """
    axes = [axis for axis, length in enumerate(shape) if length % mesh.size == 0]
    if mesh.size == 1 or np.prod(shape) < SMALL or not axes:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, P(*[None] * longest, "data"))


# Shardings of parameters by the values of `config.sharding.params`: functions from a
# mesh and the shape of an array to its sharding.
PARAMS: dict[str, Callable[[Mesh, Sequence[int]], NamedSharding]] = {
    "replicated": lambda mesh, shape: replicated(mesh),
    "fsdp": fully_sharded,
}


def all_gather_params(params: Tree, mesh: Mesh, kind: str) -> Tree:
    """All-gathers sharded parameters before they are used.

    The gradients are sharded like the parameters, so that each device keeps only its
    part of the sums. Without an explicit all-gather, the compiler might shard
    activations in the way in which the parameters are sharded.

    Args:
      params: The parameters, sharded by `PARAMS[kind]`.
      mesh: The mesh of the devices.
      kind: A key of `PARAMS`.

    Returns:
      The parameters, each replicated.
    """

    def gather(param: jax.Array) -> jax.Array:
        sharded = PARAMS[kind](mesh, param.shape)
        return param if sharded.is_fully_replicated else _gathered(sharded)(param)

    return jax.tree.map(gather, params)


def _gathered(sharded: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that all-gathers an array and shards its gradient."""
    constrain, replicated = (
        jax.lax.with_sharding_constraint,
        NamedSharding(sharded.mesh, P()),
    )

    @jax.custom_vjp
    def gathered(param: jax.Array) -> jax.Array:
        return constrain(param, replicated)

    def shard_gradient(_: None, grad: jax.Array) -> tuple[jax.Array]:
        # The gradient is first replicated, since libtpu turns that into a
        # reduce-scatter. Without it, libtpu 0.0.52 splits the convolution that computes
        # a gradient into a ring of small ones, each of which is a loop.
        return (constrain(constrain(grad, replicated), sharded),)

    gathered.defvjp(lambda param: (gathered(param), None), shard_gradient)
    return gathered


def match_varying_axes(*arrays: jax.Array) -> list[jax.Array]:
    """Marks all arrays as varying over the manual axes over which any of them varies.

    Inside `jax.shard_map` JAX tracks the axes over which an array differs between
    devices. The gradient by an array that is equal on all devices is a sum over them,
    of which a custom gradient rule computes one term per device. JAX adds the terms up
    if the array is marked before it enters the function with that rule.

    Args:
      *arrays: The arrays that enter a function with a custom gradient rule.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    of_any: frozenset = frozenset().union(*varying)
    return [
        jax.lax.pcast(array, tuple(of_any - own), to="varying")
        if of_any - own
        else array
        for array, own in zip(arrays, varying, strict=True)
    ]


def place(values: Tree, like: Tree) -> Tree:
    """Places arrays of the host on the devices.

    Args:
      values: A tree of NumPy arrays, which are the same in all processes.
      like: Shapes and shardings, in a tree of the same structure.

    Returns:
      A tree of global arrays.
    """

    def place_array(value: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda index: value[index]
        )

    return jax.tree.map(place_array, values, like)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis into one piece per device."""
    return NamedSharding(mesh, P("data"))


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Checks that the number of devices divides a batch size.

    Args:
      key: The config key of the batch size.
      batch_size: The number of images per step over all devices.
      mesh: The mesh of the devices.

    Raises:
      UserError: The batch size is not divisible; the message names the nearest legal
        sizes.
    """
    devices = mesh.size
    if batch_size < 1 or batch_size % devices:
        legal = range(devices, max(batch_size, 0) + devices + 1, devices)
        raise UserError(
            f"{key}={batch_size} cannot be divided over {devices} devices; use a"
            " number of devices that divides it, or start a run with"
            f" {nearest_numbers(batch_size, legal)}."
        )


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the rows of a batch that this process's devices hold, ascending.

    Args:
      mesh: The mesh of the devices.
      batch_size: The number of rows over all processes.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = np.arange(batch_size)
    return sorted(int(row) for index in indices.values() for row in rows[index])


def to_devices(
    batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int
) -> dict[str, jax.Array]:
    """Transfers a batch to the devices.

    Args:
      batch: This process's rows of each array, in the order of `local_rows`.
      mesh: The mesh of the devices.
      batch_size: The number of rows over all processes.

    Returns:
      Global arrays of `batch_size` rows, sharded by `batch_sharding`.
    """
    sharding = batch_sharding(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        shape = (batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(place, batch)


def local_values(array: jax.Array) -> np.ndarray:
    """Returns this process's rows of a batch-sharded array, in ascending order."""
    shards = {
        shard.index[0].start or 0: shard.data for shard in array.addressable_shards
    }
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def union(numbers: set[int]) -> set[int]:
    """Returns the union over all processes of sets of non-negative numbers."""
    if jax.process_count() == 1:
        return numbers
    most = int(multihost_utils.process_allgather(np.array(len(numbers))).max())
    padded = np.full(most + 1, -1, np.int64)
    padded[: len(numbers)] = sorted(numbers)
    everyone = multihost_utils.process_allgather(padded)
    return {int(number) for number in everyone.ravel() if number >= 0}
