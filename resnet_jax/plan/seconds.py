"""How long computation and collectives take, by a chip's published peaks."""

import math
from collections.abc import Iterable

from resnet_jax.plan.chips import HOP, Chip

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
        if not chip.outside:
            return math.inf
        pods = math.ceil(chips / chip.pod)
        seconds += rounds * (pods - 1) / pods * size / chip.pod / chip.outside
    return seconds


def network_seconds(
    collectives: Iterable[dict], planned: int, devices: int, chips: int, chip: Chip
) -> float:
    """How long the collectives of a step take on a slice of any size.

    Args:
      collectives: of the program as it was compiled.
      planned: chips that it was compiled for.
      devices: of these.
      chips: of the slice; collectives over all devices grow with it, others do not.
      chip: its kind.
    """
    found = 0.0
    for one in collectives:
        group = one["devices"] * planned / devices
        over = chips if one["devices"] == devices else min(math.ceil(group), chips)
        found += one["times"] * ring_seconds(one["kind"], one["bytes"], over, chip)
    return found
