"""How long computation and collectives take, by a chip's published peaks."""

import math
from collections.abc import Iterable

from resnet_jax.compiler.chips import HOP, Chip

# Parts of what a collective's bytes each chip of a ring sends, times (n - 1) / n.
ROUNDS = {"all-reduce": 2}


def seconds_of(step: dict, chip: Chip, devices_per_chip: int) -> dict[str, float]:
    """How long a step takes by each measure, without its collectives.

    `compute`: operations at the peak; `memory`: bytes at the bandwidth of the HBM;
    `cycles`: the compiler's own estimate, which has both and what holds them up.
    """
    return {
        "compute": step["flops"] * devices_per_chip / chip.flops,
        "memory": step["hbm_bytes"] * devices_per_chip / chip.hbm_bandwidth,
        "cycles": step["cycles"] / chip.clock,
    }


def ring_seconds(kind: str, size: int, chips: int, chip: Chip) -> float:
    """How long a collective of `size` bytes takes over so many chips.

    Rings along all axes of a torus, in both directions, so that every link is in use:
    each chip sends (n - 1) / n of the bytes, twice for an all-reduce, and a message
    passes half of the ring of each axis. Beyond a pod, what a chip holds of the pod's
    sum goes round once more between the pods.
    """
    rounds = ROUNDS.get(kind, 1)
    inside = min(chips, chip.pod)
    side = inside ** (1 / chip.axes)
    hops = chip.axes * max(side, 2) / 2 if inside > 1 else 0
    seconds = rounds * ((inside - 1) / inside * size / chip.network + hops * HOP)
    if chips > chip.pod:
        pods = math.ceil(chips / chip.pod)
        seconds += outside_seconds(kind, size / chip.pod, pods, chip)
    return seconds


def outside_bytes(kind: str, size: int | float, slices: int) -> int | float:
    """Returns the bytes that a device sends to other slices in a collective.

    Args:
      kind: The collective, such as `all-reduce`.
      size: Bytes of the device's result, or of what it puts into a reduce-scatter.
      slices: Number of slices that take part, with one device each.
    """
    return ROUNDS.get(kind, 1) * (slices - 1) / slices * size


def outside_seconds(kind: str, size: int | float, slices: int, chip: Chip) -> float:
    """Returns how long a collective takes through the data-centre network.

    Args:
      kind, slices: See `outside_bytes`.
      size: As there, of all devices of a chip.
      chip: The kind of the chips; without a published bandwidth, the time is infinite.
    """
    sent = outside_bytes(kind, size, slices)
    if not sent:
        return 0.0
    return sent / chip.outside if chip.outside else math.inf


def network_seconds(
    collectives: Iterable[dict],
    planned: int,
    devices: int,
    chips: int,
    chip: Chip,
    slices: int = 1,
) -> float:
    """Returns how long the collectives of a step take on any number of chips.

    Args:
      collectives: Those of the program as it was compiled; see `compiled.of_step`.
      planned: Number of chips that it was compiled for.
      devices: Number of devices of these chips.
      chips: Number of chips to predict for. Collectives over all devices grow with it,
        others do not.
      chip: The kind of the chips.
      slices: Number of slices that it was compiled for. If there are several, `chips`
        are in slices of the same size: what stays inside a slice grows up to that size,
        and what goes between slices grows with their number.
    """
    inside, cores = planned // slices, devices // planned
    number = math.ceil(chips / inside) if slices > 1 else 1
    found = 0.0
    for one in collectives:
        kind, size = one["kind"], one["bytes"]
        if one.get("slices"):
            over = number if one["slices"] == slices else min(one["slices"], number)
            seconds = outside_seconds(kind, size * cores, over, chip)
        else:
            every = one["devices"] == inside * cores
            group = math.ceil(one["devices"] / cores)
            most = min(chips, inside) if slices > 1 else chips
            over = most if every else min(group, most)
            seconds = ring_seconds(kind, size, over, chip)
        found += one["times"] * seconds
    return found
