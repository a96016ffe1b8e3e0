"""Published speeds of ResNet-50 on TPUs, and the factor per chip that follows.

Each published rate was measured with a program of its authors. It is therefore compared
with the compiler's estimate for such a program, the step of the Flax ImageNet example
(`plan/stock_linen.py`), and not for our own step, which may be faster.

The factor of a chip says how many times faster its chips computed than the compiler
expects. It is taken from the slice with the highest rate per chip. On the other slices
more than the chips takes time: input, evaluation, and the update of the weights, which
few images per chip do not hide. Their deviations show how much.
"""

import dataclasses

from resnet_jax.compiler.chips import CHIPS
from resnet_jax.plan.time_model import ring_seconds, seconds_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stock:
    """Figures that libtpu gives for the stock step (bfloat16, 224 px) on one device.

    Attributes:
      images: Number of images per step.
      devices: Number of devices per chip.
      flops: Floating-point operations per step.
      hbm_bytes: Bytes per step that are read from and written to the device's HBM.
      cycles: The compiler's estimate of the clock cycles per step.
      libtpu: Version of libtpu that gave the figures.
      jax: Version of jax that gave the figures.
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
    """A published training speed of ResNet-50 on images of 224 px.

    Attributes:
      rate: Images per second and chip.
      chips: Number of chips of the slice.
      per_chip: Images per step and chip.
      source: Publication that has the figures.
    """

    rate: float
    chips: int
    per_chip: int
    source: str


# Training images of ImageNet.
EPOCH = 1_281_167
# Printed by `python -m resnet_jax.plan.stock v3 v4`.
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
        # The time of four epochs without their evaluations.
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
        # The time of four epochs with their evaluations.
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
# Bytes that the stock step all-reduces: the gradients of all parameters in bfloat16.
REDUCED = 2 * 25_557_032


def estimate(chip: str, slice_: Published, factor: float = 1.0) -> float:
    """Estimates the rate of the stock step on the slice of a published rate.

    Args:
      chip: Name of the chip, a key of `PUBLISHED`.
      slice_: The published rate, whose numbers of chips and of images are taken.
      factor: Ratio of the chips' speed to the speed that the compiler expects.

    Returns:
      Images per second and chip.
    """
    computation = _computation_seconds(chip, slice_)
    network = ring_seconds("all-reduce", REDUCED, slice_.chips, CHIPS[chip])
    return slice_.per_chip / (computation / factor + network)


def factor_of(chip: str) -> float | None:
    """Returns how many times faster a chip is than the compiler expects, if known."""
    if chip not in STOCK or chip not in PUBLISHED:
        return None
    fastest = max(PUBLISHED[chip], key=lambda published: published.rate)
    network = ring_seconds("all-reduce", REDUCED, fastest.chips, CHIPS[chip])
    measured = fastest.per_chip / fastest.rate - network
    return _computation_seconds(chip, fastest) / measured


def libtpu_of(chip: str) -> str:
    """Returns the version of libtpu for which `factor_of` is valid, or "" without one.

    Another version may estimate other cycles for the same step.
    """
    return STOCK[chip].libtpu if factor_of(chip) else ""


def calibrated(seconds: dict[str, float], factor: float | None) -> float:
    """Returns the seconds of computation, at least those that the peaks allow.

    Args:
      seconds: The step's time by each measure, from `time_model.seconds_of`.
      factor: The chip's factor from `factor_of`. None leaves the estimate as it is.
    """
    at_least = max(seconds["compute"], seconds["memory"])
    return max(max(seconds.values()) / (factor or 1.0), at_least)


def deviations(chip: str) -> list[tuple[Published, float]]:
    """Returns each published rate with its deviation from the calibrated estimate.

    A deviation of 0.1 means that the published rate is 10 % above the estimate.
    """
    factor = factor_of(chip)
    if factor is None:
        return []
    return [
        (published, published.rate / estimate(chip, published, factor) - 1)
        for published in PUBLISHED[chip]
    ]


def _computation_seconds(chip: str, slice_: Published) -> float:
    """Returns the seconds that a step computes on a slice, by the compiler."""
    stock = STOCK[chip]
    seconds = seconds_of(dataclasses.asdict(stock), CHIPS[chip], stock.devices)
    images = stock.images * stock.devices
    return max(seconds.values()) * slice_.per_chip / images
