"""The mesh of devices, and what lies where on it."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resnet_jax.errors import UserError, nearest_numbers


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Devices along one axis, `data`; those of all processes unless told otherwise."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is cut into one piece a device."""
    return NamedSharding(mesh, P("data"))


def check_batch_size(key: str, batch_size: int, mesh: Mesh) -> None:
    """Raises UserError with the nearest legal sizes unless the devices divide it."""
    devices = mesh.size
    if batch_size < 1 or batch_size % devices:
        legal = range(devices, max(batch_size, 0) + devices + 1, devices)
        raise UserError(
            f"{key}={batch_size} cannot be divided over {devices} devices; the nearest"
            f" that can: {nearest_numbers(batch_size, legal)}."
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
