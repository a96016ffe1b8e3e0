"""What was published of ResNet-50 on TPUs, and a factor a chip that follows from it.

Whoever published a rate ran a program of his own. So a rate is held against the
compiler's estimate for a program of that kind, the step of the Flax ImageNet example
(plan/stock_linen.py), not for ours, which is to gain where it is better. The factor of
a chip is that of the slice that got most out of one: how many times faster its chips
computed than the compiler expects. On other slices more than the chips takes time
(input, evaluation, the update of the weights, which few images a chip do not hide), as
their deviations show.
"""

import dataclasses

from resnet_jax.compiler.chips import CHIPS
from resnet_jax.plan.time_model import ring_seconds, seconds_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stock:
    """What libtpu says of the stock step (bfloat16, 224 px) on one device.

    Attributes:
      images: of a step.
      devices: of a chip.
      flops, hbm_bytes, cycles: of a step; see `compiled.of_step`.
      libtpu, jax: The versions that gave the figures.
    """

    images: int
    devices: int
    flops: float
    hbm_bytes: float
    cycles: float
    libtpu: str
    jax: str


@dataclasses.dataclass(frozen=True)
class Published:
    """How fast somebody trained ResNet-50 on images of 224 px.

    Attributes:
      rate: images per second and chip.
      chips: of the slice.
      per_chip: images a step and chip.
      source: of the figures.
    """

    rate: float
    chips: int
    per_chip: int
    source: str


EPOCH = 1_281_167
# Printed by `python -m resnet_jax.plan.compile_stock_linen v3 v4`.
STOCK = {
    "v3": Stock(
        images=128,
        devices=2,
        flops=3.0862e12,
        hbm_bytes=34.066e9,
        cycles=129.096e6,
        libtpu="0.0.52",
        jax="0.10.2",
    ),
    "v4": Stock(
        images=128,
        devices=1,
        flops=3.0851e12,
        hbm_bytes=28.556e9,
        cycles=54.898e6,
        libtpu="0.0.52",
        jax="0.10.2",
    ),
}
PUBLISHED = {
    "v3": (
        # Of four epochs, without their evaluation.
        Published(
            4 * EPOCH / 157.3 / 16, 16, 256, "MLPerf 0.7, TensorFlow 2, v3-32, its log"
        ),
        Published(
            125_100 * 1024 / (4.4 * 3600) / 4, 4, 256, "Flax's ImageNet README, v3-8"
        ),
        Published(
            125_100 * 1024 / (2.1 * 3600) / 16, 16, 64, "Flax's ImageNet README, v3-32"
        ),
    ),
    "v4": (
        # Of four epochs and their evaluation.
        Published(
            4 * EPOCH / 23.2 / 64, 64, 128, "MLPerf 1.0, TensorFlow, v4-128, its log"
        ),
        Published(
            7.44e6 / 3456, 3456, 16, "MLPerf 2.0, TensorFlow, v4-6912, 0.23 minutes"
        ),
        Published(
            6.5e6 / 4096, 4096, 8, "MLPerf 2.0, TensorFlow, v4-8192, 0.19 minutes"
        ),
    ),
}
# Bytes that the stock step reduces: gradients in bfloat16.
REDUCED = 2 * 25_557_032


def estimate(chip: str, slice_: Published, factor: float = 1.0) -> float:
    """Images per second and chip of the stock step on the slice of a published rate.

    Args:
      chip: of `PUBLISHED`.
      slice_: chips and images are taken from it.
      factor: by which its chips compute faster than the compiler expects.
    """
    alone = _alone(chip, slice_)
    network = ring_seconds("all-reduce", REDUCED, slice_.chips, CHIPS[chip])
    return slice_.per_chip / (alone / factor + network)


def factor_of(chip: str) -> float | None:
    """How many times faster a chip is than the compiler expects; None: not known."""
    if chip not in STOCK or chip not in PUBLISHED:
        return None
    fastest = max(PUBLISHED[chip], key=lambda one: one.rate)
    network = ring_seconds("all-reduce", REDUCED, fastest.chips, CHIPS[chip])
    return _alone(chip, fastest) / (fastest.per_chip / fastest.rate - network)


def libtpu_of(chip: str) -> str:
    """Returns the version of libtpu for which `factor_of` holds; empty if it is None.

    Another version may expect other cycles of the same step.
    """
    return STOCK[chip].libtpu if factor_of(chip) else ""


def calibrated(seconds: dict[str, float], factor: float | None) -> float:
    """Seconds of computation, but no less than the published peaks allow.

    Args:
      seconds: see `seconds.seconds_of`.
      factor: see `factor_of`.
    """
    at_least = max(seconds["compute"], seconds["memory"])
    return max(max(seconds.values()) / (factor or 1.0), at_least)


def deviations(chip: str) -> list[tuple[Published, float]]:
    """Each published rate, and how far (0.1: 10 %) it is from the calibrated one."""
    factor = factor_of(chip)
    if factor is None:
        return []
    return [
        (one, one.rate / estimate(chip, one, factor) - 1) for one in PUBLISHED[chip]
    ]


def _alone(chip: str, slice_: Published) -> float:
    """Seconds of computation of a step of the slice, by the compiler."""
    stock = STOCK[chip]
    seconds = seconds_of(dataclasses.asdict(stock), CHIPS[chip], stock.devices)
    images = stock.images * stock.devices
    return max(seconds.values()) * slice_.per_chip / images
