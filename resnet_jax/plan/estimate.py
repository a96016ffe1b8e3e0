"""Estimates seconds, hours, CPU cores and cost from what a compiler reports."""

import dataclasses
import math
from typing import Any

from resnet_jax.compiler.chips import CHIPS
from resnet_jax.plan import calibration
from resnet_jax.plan.time_model import network_seconds, outside_bytes, seconds_of

# Numbers of chips for which the efficiency is printed.
SLICES = (1, 4, 16, 64, 256, 1024, 4096)
# The type of the published runs, and the only one that is calibrated: how cautious the
# compiler's estimates are depends on the type.
DTYPE = "bfloat16"


def total(memory: dict[str, int]) -> int:
    """Returns the bytes of all parts of a step's memory."""
    return sum(memory.values())


def estimate(
    facts: dict, *, input_rate: float = 0.0, price: float = 0.0
) -> dict[str, Any]:
    """Estimates the memory, speed and cost of a run.

    Args:
      facts: The compiler's figures, from `compile_steps.facts`.
      input_rate: Images per second that a CPU core of a host prepares, as `bench input`
        measures it. 0 leaves `cores` out.
      price: Price of a chip-hour. 0 leaves `cost` out.

    Returns:
      Always `fits`, and in bytes of a device `memory` (that the larger step needs) and
      `limit` (that there is).

      If the run fits on several slices of a known chip, also `outside_bytes`: the bytes
      that a chip sends to other slices in a train step.

      If the run fits on a chip of known peaks, and, for several slices, of known
      bandwidth between them (`Chip.outside`), also:

      - `seconds`: the seconds of a train step by `compute`, `memory`, `cycles`,
        `network` and, for several slices, `outside` (the part of `network` between
        them), and `bound`: which of them limits the step;
      - `rate`: images per second and chip, with `factor` (of the calibration, or None),
        `calibrated` (whether the factor is for the version of libtpu that compiled),
        `published` (each published rate with its `deviation` from the estimate),
        `uncalibrated` (the rate without the factor), `most` (the rate by the published
        peaks alone) and `utilization` (operations per second as a fraction of the
        peak);
      - `efficiency`: the fraction of the rate that remains on each number of chips of
        `SLICES`, or None if unknown;
      - `hours`, the part `eval_hours` of it, and `cost`;
      - `host_rate`: images per second and host, and `cores`: the CPU cores of a host
        that prepare them.
    """
    steps = [facts[name] for name in ("train", "eval") if name in facts]
    needs = [
        total(step["memory"]) if "memory" in step else step["wanted"] for step in steps
    ]
    limits = [step["limit"] for step in steps if step.get("limit")]
    limit = limits[0] if limits else facts["memory"]
    fits = all("memory" in step for step in steps) and max(needs) <= limit
    estimates: dict[str, Any] = {"fits": fits, "memory": max(needs), "limit": limit}
    if not (fits and facts["chip"]):
        return estimates
    chip, chips = CHIPS[facts["chip"]], facts["chips"]
    devices = facts["devices"]
    train = facts["train"]
    factor = calibration.factor_of(facts["chip"]) if facts["dtype"] == DTYPE else None
    version = facts["versions"].get("libtpu")
    seconds = seconds_of(train, chip, devices // chips)
    uncalibrated = max(seconds.values())
    computation = calibration.calibrated(seconds, factor)

    slices = facts.get("slices", 1)

    def network(collectives: list[dict], number: int) -> float:
        return network_seconds(collectives, chips, devices, number, chip, slices)

    seconds["network"] = network(train["collectives"], chips)
    if slices > 1:
        between = [x for x in train["collectives"] if x["slices"]]
        estimates["outside_bytes"] = (devices // chips) * sum(
            x["times"] * outside_bytes(x["kind"], x["bytes"], x["slices"])
            for x in between
        )
        seconds["outside"] = network(between, chips)
        if not math.isfinite(seconds["outside"]):
            return estimates
    step_seconds = computation + seconds["network"]
    images = facts["batch_size"] / chips
    rate = images / step_seconds
    peaks = "memory" if seconds["memory"] > seconds["compute"] else "compute"
    flops_per_second = train["flops"] * devices / chips / step_seconds
    estimates |= {
        "seconds": seconds,
        "bound": "network" if seconds["network"] > computation else peaks,
        "rate": rate,
        "factor": factor,
        "calibrated": bool(factor) and version == calibration.libtpu_of(facts["chip"]),
        "published": [
            dataclasses.asdict(published) | {"deviation": deviation}
            for published, deviation in calibration.deviations(facts["chip"])
        ],
        "uncalibrated": images / (uncalibrated + seconds["network"]),
        "most": images / (seconds[peaks] + seconds["network"]),
        "utilization": flops_per_second / chip.flops,
        # A program for one device does not show what more devices would exchange.
        "efficiency": {
            n: computation / (computation + network(train["collectives"], n)) or None
            for n in SLICES
            if devices > 1
        },
        "hours": facts["steps"] * step_seconds / 3600,
        "host_rate": rate * chips / facts["hosts"],
    }
    if "eval" in facts:
        evaluation = facts["eval"]
        eval_seconds = calibration.calibrated(
            seconds_of(evaluation, chip, devices // chips), factor
        ) + network(evaluation["collectives"], chips)
        batches = math.ceil(facts["eval_images"] / facts["eval_batch_size"])
        estimates["eval_hours"] = facts["evaluations"] * batches * eval_seconds / 3600
        estimates["hours"] += estimates["eval_hours"]
    if input_rate:
        estimates["cores"] = math.ceil(estimates["host_rate"] / input_rate)
    if price:
        estimates["cost"] = estimates["hours"] * chips * price
    return estimates
