"""The mesh of devices, and what lies where on it."""

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
from resnet_jax.parallel import accelerators

Tree = Any
# A `jax.Device`, or an object that describes one as far as a mesh asks.
Device = Any

# Smaller arrays are whole on every device: in float32 they are 64 KiB, which a link of
# a TPU (some 50 GB/s) carries in the time that a message takes to get there.
SMALL = 2**14

# The warnings on accelerators that were printed.
_warned: set[str] = set()


def find_devices(root: pathlib.Path = pathlib.Path("/")) -> list[jax.Device]:
    """Returns the devices of all processes.

    The lead process warns, once, if JAX chose CPUs although this machine has a GPU or a
    TPU.

    Args:
      root: The root of the file system, in which the kernel lists devices.

    Raises:
      UserError: JAX can use no devices.
    """
    try:
        with accelerators.hints_held() as hints:
            devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = jax.config.jax_platforms
        asked = f" of JAX_PLATFORMS={platforms}" if platforms else ""
        reason = str(error).partition(" (set JAX_PLATFORMS")[0].rstrip(".")
        # JAX says nothing where it lacks a platform that it knows by name.
        reason = reason or "it is not installed"
        raise UserError(
            f"JAX can use no devices{asked} ({reason}). Install jax[tpu] or jax[cuda13]"
            " for TPUs or GPUs, see that no other process holds them, or unset"
            " JAX_PLATFORMS to run on what there is."
        ) from None
    chosen = jax.config.jax_platforms
    if devices[0].platform == "cpu" and not chosen and jax.process_index() == 0:
        _warn_of_accelerators(root, [hint.getMessage() for hint in hints])
    return devices


def _warn_of_accelerators(root: pathlib.Path, hints: Sequence[str]) -> None:
    """Warns once of an accelerator that is not used, in our words or else in JAX's."""
    hidden = accelerators.hidden()
    advice = accelerators.advice(root, accelerators.installed(), hidden)
    for text in [advice] if advice else [] if hidden else hints:
        if text not in _warned:
            _warned.add(text)
            output.warn(text)


def make_mesh(devices: Sequence[Device] | None = None) -> Mesh:
    """Returns the mesh of all devices along one axis, `data`.

    Devices of one slice are ordered as `jax.make_mesh` orders them. Of several slices,
    which `jax.make_mesh` refuses, the mesh has one slice after the other, and within a
    slice one process after the other. So each process holds consecutive rows of a
    batch, and neighbours in the mesh are neighbours in the fast network.

    Args:
      devices: The devices, in any order; by default those of all processes.

    Raises:
      UserError: There are no devices, or TPU slices of different sizes, for which
        libtpu cannot compile.
    """
    devices = find_devices() if devices is None else devices
    slices: dict[int, list[Device]] = {}
    for device in devices:
        slices.setdefault(slice_of(device), []).append(device)
    if len(slices) == 1:
        return _mesh_of_slice(devices)
    sizes = {index: len(slices[index]) for index in sorted(slices)}
    if devices[0].platform == "tpu" and len(set(sizes.values())) > 1:
        told = ", ".join(f"slice {index} has {size}" for index, size in sizes.items())
        raise UserError(
            f"A run on several TPU slices needs as many devices on each ({told}). Take"
            " slices of one topology."
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

    A slice is what the fast network connects: a TPU slice, or an NVLink domain of GPUs,
    which is one node on most systems. JAX numbers slices only where there can be
    several; all CPU devices are one slice.
    """
    return getattr(device, "slice_index", None) or 0


def slice_count(mesh: Mesh) -> int:
    """Returns the number of slices whose devices are in the mesh."""
    return len({slice_of(device) for device in mesh.devices.flat})


def platform_of(mesh: Mesh) -> str:
    """`cpu`, `gpu` or `tpu`: what its devices are."""
    return mesh.devices.flat[0].platform


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def fully_sharded(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """The longest axis that the devices divide is cut, the first of equal ones.

    Arrays of less than `SMALL` numbers, or without such an axis, are whole everywhere.
    """
    axes = [axis for axis, length in enumerate(shape) if length % mesh.size == 0]
    if mesh.size == 1 or np.prod(shape) < SMALL or not axes:
        return replicated(mesh)
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(mesh, P(*[None] * longest, "data"))


# How parameters may lie, by the names of `config.sharding.params`: from a mesh and an
# array's shape to its sharding.
PARAMS: dict[str, Callable[[Mesh, Sequence[int]], NamedSharding]] = {
    "replicated": lambda mesh, shape: replicated(mesh),
    "fsdp": fully_sharded,
}


def whole(params: Tree, mesh: Mesh, kind: str) -> Tree:
    """Parameters to compute with: all of each on every device.

    Their gradients lie as the parameters do, so that devices exchange what they add to
    them, and never keep more than their part. Left to itself, the compiler might cut
    activations as the parameters are cut.

    Args:
      params: as they lie by `PARAMS[kind]`.
      mesh: of the devices.
      kind: a name of `PARAMS`.
    """

    def one(param: jax.Array) -> jax.Array:
        placed = PARAMS[kind](mesh, param.shape)
        return param if placed.is_fully_replicated else _gathered(placed)(param)

    return jax.tree.map(one, params)


def _gathered(placed: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    """Makes an array that lies in parts whole; its gradient lies in parts again."""
    constrain, everywhere = jax.lax.with_sharding_constraint, replicated(placed.mesh)

    @jax.custom_vjp
    def gathered(param: jax.Array) -> jax.Array:
        return constrain(param, everywhere)

    def back(_: None, grad: jax.Array) -> tuple[jax.Array]:
        # First whole, of which libtpu makes a reduce-scatter. Without, its version
        # 0.0.52 cuts a gradient's convolution into a ring of small ones, each a loop.
        return (constrain(constrain(grad, everywhere), placed),)

    gathered.defvjp(lambda param: (gathered(param), None), back)
    return gathered


def alike(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays that differ between the devices of a `jax.shard_map` if one of them does.

    A gradient that is not JAX's own does not tell that each device has its part of what
    is the same on all. Behind this, JAX adds the parts up.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    of_any = frozenset().union(*varying)
    return [
        jax.lax.pcast(array, tuple(of_any - own), to="varying")
        if of_any - own
        else array
        for array, own in zip(arrays, varying, strict=True)
    ]


def place(values: Tree, like: Tree) -> Tree:
    """Arrays of the host, the same in all processes, as `like` says where they lie."""

    def one(value: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        value = np.asarray(value)
        return jax.make_array_from_callback(
            like.shape, like.sharding, lambda index: value[index]
        )

    return jax.tree.map(one, values, like)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is cut into one piece a device."""
    return NamedSharding(mesh, P("data"))


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError with the nearest legal sizes unless the devices divide it."""
    devices = mesh.size
    if batch_size < 1 or batch_size % devices:
        legal = range(devices, max(batch_size, 0) + devices + 1, devices)
        raise UserError(
            f"{key}={batch_size} cannot be divided over {devices} devices; use a"
            " number of devices that divides it, or start a run with"
            f" {nearest_numbers(batch_size, legal)}."
        )


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Which rows of a batch this process's devices hold, in ascending order."""
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return sorted(
        row for (piece,) in indices.values() for row in range(batch_size)[piece]
    )


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int):
    """Puts this process's rows where they belong; returns global arrays."""
    sharding = batch_sharding(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        shape = (batch_size, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, rows, shape)

    return jax.tree.map(place, batch)


def local_values(array: jax.Array) -> np.ndarray:
    """This process's rows of a batch-sharded array, in ascending order."""
    shards = {
        shard.index[0].start or 0: shard.data for shard in array.addressable_shards
    }
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def union(numbers: set[int]) -> set[int]:
    """The union of a set of numbers, none negative, over all processes."""
    if jax.process_count() == 1:
        return numbers
    most = int(multihost_utils.process_allgather(np.array(len(numbers))).max())
    padded = np.full(most + 1, -1, np.int64)
    padded[: len(numbers)] = sorted(numbers)
    everyone = multihost_utils.process_allgather(padded)
    return {int(number) for number in everyone.ravel() if number >= 0}
