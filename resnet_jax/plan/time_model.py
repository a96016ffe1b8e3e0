"""Estimates how long computation and collectives take, from a chip's peaks."""

import math
from collections.abc import Iterable

from resnet_jax.compiler.chips import HOP, Chip

# How many times each chip of a ring of n sends (n - 1) / n of a collective's bytes;
# once for the kinds that are not listed.
ROUNDS = {"all-reduce": 2}


def seconds_of(step: dict, chip: Chip, devices_per_chip: int) -> dict[str, float]:
    """Returns the time of a step by each measure, without its collectives.

    Args:
      step: The compiler's figures of a device, from `compile_steps.figures_of_step`.
      chip: The chip that runs the step.
      devices_per_chip: Number of devices of a chip.

    Returns:
      Seconds by `compute` (operations at the peak), `memory` (bytes at the bandwidth of
      the HBM) and `cycles` (the compiler's own estimate, which includes both and the
      waits for them).
    """
    return {
        "compute": step["flops"] * devices_per_chip / chip.flops,
        "memory": step["hbm_bytes"] * devices_per_chip / chip.hbm_bandwidth,
        "cycles": step["cycles"] / chip.clock,
    }


def ring_seconds(kind: str, size: int | float, chips: int, chip: Chip) -> float:
    """Returns the seconds that a collective takes on the fast network between chips.

    Rings run along all axes of a torus in both directions, so that every link is in
    use: each chip sends (n - 1) / n of the bytes, twice for an all-reduce, and a
    message passes half of the ring of each axis. Beyond one pod, each chip's share of
    the pod's result goes around once more between the pods.

    Args:
      kind: The collective, such as `all-reduce`.
      size: Bytes of a device's result, or of its operand for a reduce-scatter.
      chips: Number of chips that take part.
      chip: The kind of the chips.
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
      size: Bytes of a device's result, or of its operand for a reduce-scatter.
      slices: Number of slices that take part, with one device each.
    """
    return ROUNDS.get(kind, 1) * (slices - 1) / slices * size


def outside_seconds(kind: str, size: int | float, slices: int, chip: Chip) -> float:
    """Returns the seconds that a collective takes through the data-centre network.

    Args:
      kind: The collective, such as `all-reduce`.
      size: Bytes as in `outside_bytes`, summed over the devices of a chip.
      slices: Number of slices that take part, with one chip each.
      chip: The kind of the chips. Without a published bandwidth the time is infinite.
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
    """Returns the seconds that the collectives of a step take on any number of chips.

    Args:
      collectives: The collectives of the compiled step, from
        `compile_steps.figures_of_step`.
      planned: Number of chips that the step was compiled for.
      devices: Number of devices of these chips.
      chips: Number of chips to estimate for. Collectives over all devices grow with it,
        others do not.
      chip: The kind of the chips.
      slices: Number of slices that the step was compiled for. If there are several,
        `chips` are in slices of the same size: a collective inside a slice grows up to
        that size, and one between slices grows with their number.
    """
    chips_per_slice, devices_per_chip = planned // slices, devices // planned
    slices_now = math.ceil(chips / chips_per_slice) if slices > 1 else 1
    chips_inside = min(chips, chips_per_slice) if slices > 1 else chips
    total = 0.0
    for collective in collectives:
        kind, size = collective["kind"], collective["bytes"]
        if between := collective.get("slices"):
            members = slices_now if between == slices else min(between, slices_now)
            seconds = outside_seconds(kind, size * devices_per_chip, members, chip)
        else:
            if collective["devices"] == chips_per_slice * devices_per_chip:
                members = chips_inside
            else:
                group = math.ceil(collective["devices"] / devices_per_chip)
                members = min(group, chips_inside)
            seconds = ring_seconds(kind, size, members, chip)
        total += collective["times"] * seconds
    return total
