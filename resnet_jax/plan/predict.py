"""The arithmetic from what a compiler says to seconds, hours, cores and money."""

import math
from collections.abc import Iterable

from resnet_jax.plan.chips import CHIPS, HOP, RESNET50, Chip

# Chips whose scaling is told.
SLICES = (1, 4, 16, 64, 256, 1024, 4096)
# Parts of what a collective's bytes each chip of a ring sends, times (n - 1) / n.
ROUNDS = {"all-reduce": 2}


def total(memory: dict[str, int]) -> int:
    """Bytes of all parts."""
    return sum(memory.values())


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


def predict(
    facts: dict, *, input_rate: float = 0.0, price: float = 0.0
) -> dict[str, object]:
    """What is to be expected of a run.

    Args:
      facts: see `compiled.facts`.
      input_rate: images per second that a core of a host prepares, of `bench input`.
      price: of a chip-hour.

    Returns:
      `fits` and `memory` (bytes of a device that the larger step wants; `limit`: that
      there are), and, for chips of known peaks, if it fits: `seconds` of a train step
      by `compute`, `memory`, `cycles` and `network`, their `bound`, `rate` (images per
      second and chip), `most` (that rate if the compiler's cycles are left out),
      `utilization` (operations per second as part of the peak), `efficiency` by chips,
      `hours`, of which `eval_hours`, `host_rate` (images per second and host), `cores`
      (of a host), `cost`, and `published` (see `RESNET50`) with the `deviations` of
      `rate` and `most` from it.
    """
    steps = [facts[name] for name in ("train", "eval") if name in facts]
    wanted = [
        total(step["memory"]) if "memory" in step else step["wanted"] for step in steps
    ]
    limits = [step["limit"] for step in steps if step.get("limit")]
    limit = limits[0] if limits else facts["memory"]
    fits = all("memory" in step for step in steps) and max(wanted) <= limit
    found: dict[str, object] = {"fits": fits, "memory": max(wanted), "limit": limit}
    if not (fits and facts["chip"]):
        return found
    chip, chips = CHIPS[facts["chip"]], facts["chips"]
    devices = facts["devices"]
    # The compiler counts what loops repeat once; forward and twice backward.
    least = 3 * 2 * facts["macs"] * facts["batch_size"] / devices
    train = facts["train"] | {"flops": max(facts["train"]["flops"], least)}
    seconds = seconds_of(train, chip, devices // chips)
    alone = max(seconds.values())

    def network(step: dict, over: int) -> float:
        return network_seconds(step["collectives"], chips, devices, over, chip)

    seconds["network"] = network(train, chips)
    step = alone + seconds["network"]
    images = facts["batch_size"] / chips
    rate = images / step
    bounds = {what: seconds[what] for what in ("compute", "memory", "network")}
    most = images / (max(bounds["compute"], bounds["memory"]) + bounds["network"])
    flops_per_second = train["flops"] * devices / chips / step
    found |= {
        "seconds": seconds,
        "bound": max(bounds, key=bounds.get),
        "rate": rate,
        "most": most,
        "utilization": flops_per_second / chip.flops,
        # Nothing is known of what a program for one device would exchange.
        "efficiency": {
            n: alone / (alone + network(train, n)) for n in SLICES if devices > 1
        },
        "hours": facts["steps"] * step / 3600,
        "host_rate": rate * chips / facts["hosts"],
    }
    if "eval" in facts:
        by = seconds_of(facts["eval"], chip, devices // chips)
        one = max(by.values()) + network(facts["eval"], chips)
        batches = math.ceil(facts["eval_images"] / facts["eval_batch_size"])
        found["eval_hours"] = facts["evaluations"] * batches * one / 3600
        found["hours"] += found["eval_hours"]
    if input_rate:
        found["cores"] = math.ceil(found["host_rate"] / input_rate)
    if price:
        found["cost"] = found["hours"] * chips * price
    if facts["image_size"] == 224 and facts["model"].endswith("resnet50"):
        published = RESNET50.get(facts["chip"])
        if published:
            found["published"] = published.rate
            found["deviations"] = [rate / published.rate - 1, most / published.rate - 1]
    return found
