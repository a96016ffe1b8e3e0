"""The arithmetic from what a compiler says to seconds, hours, cores and money."""

import dataclasses
import math

from resnet_jax.compiler.chips import CHIPS
from resnet_jax.plan import calibration
from resnet_jax.plan.time_model import network_seconds, outside_bytes, seconds_of

# Chips whose scaling is told.
SLICES = (1, 4, 16, 64, 256, 1024, 4096)
DTYPE = "bfloat16"


def total(memory: dict[str, int]) -> int:
    """Bytes of all parts."""
    return sum(memory.values())


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
      there are). Of several slices of a known chip, if it fits, also `outside_bytes`
      (that a chip sends to other slices in a train step). For chips of known peaks, of
      which several slices need a known `Chip.outside`, if it fits: `seconds` of a train
      step by `compute`, `memory`, `cycles`, `network` and, of several slices, `outside`
      (the part of `network` between them), their `bound`, `rate` (images per second and
      chip), calibrated by `factor` (None: not, see `calibration`), `calibrated`
      (whether the factor is of the version of libtpu that compiled), of what was
      `published` (each rate with its `deviation` from the estimate), `uncalibrated`
      (the rate without), `most` (that by the published peaks alone), `utilization`
      (operations per second as part of the peak), `efficiency` by chips (None: not
      known), `hours`, of which `eval_hours`, `host_rate` (images per second and host),
      `cores` (of a host) and `cost`.
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
    train = facts["train"]
    # What was published is of this type, and the compiler's caution depends on it.
    factor = calibration.factor_of(facts["chip"]) if facts["dtype"] == DTYPE else None
    version = facts["versions"].get("libtpu")
    seconds = seconds_of(train, chip, devices // chips)
    plain, alone = max(seconds.values()), calibration.calibrated(seconds, factor)

    slices = facts.get("slices", 1)

    def network(step: dict, over: int) -> float:
        return network_seconds(step["collectives"], chips, devices, over, chip, slices)

    seconds["network"] = network(train, chips)
    if slices > 1:
        between = [one for one in train["collectives"] if one["slices"]]
        found["outside_bytes"] = (devices // chips) * sum(
            one["times"] * outside_bytes(one["kind"], one["bytes"], one["slices"])
            for one in between
        )
        seconds["outside"] = network({"collectives": between}, chips)
        if not math.isfinite(seconds["outside"]):
            return found
    step = alone + seconds["network"]
    images = facts["batch_size"] / chips
    rate = images / step
    peaks = max("compute", "memory", key=seconds.get)
    most = images / (seconds[peaks] + seconds["network"])
    flops_per_second = train["flops"] * devices / chips / step
    found |= {
        "seconds": seconds,
        "bound": "network" if seconds["network"] > alone else peaks,
        "rate": rate,
        "factor": factor,
        "calibrated": bool(factor) and version == calibration.libtpu_of(facts["chip"]),
        "published": [
            dataclasses.asdict(one) | {"deviation": deviation}
            for one, deviation in calibration.deviations(facts["chip"])
        ],
        "uncalibrated": images / (plain + seconds["network"]),
        "most": most,
        "utilization": flops_per_second / chip.flops,
        # Nothing is known of what a program for one device would exchange.
        "efficiency": {
            n: alone / (alone + network(train, n)) or None
            for n in SLICES
            if devices > 1
        },
        "hours": facts["steps"] * step / 3600,
        "host_rate": rate * chips / facts["hosts"],
    }
    if "eval" in facts:
        by = seconds_of(facts["eval"], chip, devices // chips)
        one = calibration.calibrated(by, factor) + network(facts["eval"], chips)
        batches = math.ceil(facts["eval_images"] / facts["eval_batch_size"])
        found["eval_hours"] = facts["evaluations"] * batches * one / 3600
        found["hours"] += found["eval_hours"]
    if input_rate:
        found["cores"] = math.ceil(found["host_rate"] / input_rate)
    if price:
        found["cost"] = found["hours"] * chips * price
    return found
