"""Published peaks of TPU chips, and the names of their topologies.

A topology is a chip and the shape of a slice, such as `v5e:2x4`, several such slices,
such as `2*v5e:2x4`, or `local`, which means all devices of this machine.
"""

import dataclasses
import math
import re

from resnet_jax.errors import UserError, nearest

GIB = 2**30
DOCS = "cloud.google.com/tpu/docs/"
# Seconds that a message takes from a chip to its neighbour. This is an assumption, of
# the order of magnitude in the JAX scaling book, since no figure is published.
HOP = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The peak figures of a TPU chip, from its maker's documents.

    Attributes:
      kind: JAX's name for its devices.
      flops: Operations in bfloat16 per second; a multiply-add is two operations.
      mxus: The number of systolic arrays for matrix multiplication (MXUs).
      mxu_side: The side of an MXU, in elements.
      hbm: The size of its high-bandwidth memory, in bytes.
      hbm_bandwidth: The bandwidth of this memory, in bytes per second.
      network: The bandwidth of sending over all its links, in bytes per second.
      pod: The largest number of chips in one network, and so in a slice.
      axes: The number of axes of the network's torus.
      host: The largest number of chips in a slice with a single host.
      outside: The bandwidth per chip of the data-centre network, which connects slices
        and pods, in bytes per second. 0 if it is not published.
      config: The configuration of the chip's cores by libtpu's name: `megacore` if two
        cores are one device.
      source: The document with the figures.
    """

    kind: str
    flops: float
    mxus: int
    mxu_side: int
    hbm: int
    hbm_bandwidth: float
    network: float
    pod: int
    axes: int
    host: int = 4
    outside: float = 0.0
    config: str = "default"
    source: str

    @property
    def clock(self) -> float:
        """Clock rate at which the MXUs reach the published peak, in cycles per second.

        An MXU computes side^2 multiply-adds, of two operations each, in a cycle.
        """
        return self.flops / (self.mxus * self.mxu_side**2 * 2)


# `network` is the all-reduce bandwidth of a pod divided by its chips, or half of the
# bandwidth in both directions. `outside` is the data-centre bandwidth of a pod divided
# by its chips.
# Some versions of the page on v6e count two MXUs. But then the clock rate would be 3.5
# GHz, and libtpu expects more operations per cycle of a matmul (369e3) than two MXUs
# can compute. The same holds for tpu7x.
CHIPS = {
    "v3": Chip(
        kind="TPU v3",
        flops=123e12,
        mxus=4,
        mxu_side=128,
        hbm=32 * GIB,
        hbm_bandwidth=900e9,
        network=340e12 / 1024,
        pod=1024,
        axes=2,
        source=DOCS + "v3",
    ),
    "v4": Chip(
        kind="TPU v4",
        flops=275e12,
        mxus=8,
        mxu_side=128,
        hbm=32 * GIB,
        hbm_bandwidth=1200e9,
        network=1.1e15 / 4096,
        pod=4096,
        axes=3,
        config="megacore",
        source=DOCS + "v4",
    ),
    "v5e": Chip(
        kind="TPU v5 lite",
        flops=197e12,
        mxus=4,
        mxu_side=128,
        hbm=16 * GIB,
        hbm_bandwidth=819e9,
        network=51.2e12 / 256,
        pod=256,
        axes=2,
        host=8,
        outside=6.4e12 / 8 / 256,
        source=DOCS + "v5e",
    ),
    "v5p": Chip(
        kind="TPU v5",
        flops=459e12,
        mxus=8,
        mxu_side=128,
        hbm=95 * GIB,
        hbm_bandwidth=2765e9,
        network=1200e9 / 2,
        pod=8960,
        axes=3,
        outside=50e9 / 8,
        source=DOCS + "v5p",
    ),
    "v6e": Chip(
        kind="TPU v6 lite",
        flops=918e12,
        mxus=4,
        mxu_side=256,
        hbm=32 * GIB,
        hbm_bandwidth=1640e9,
        network=102.4e12 / 256,
        pod=256,
        axes=2,
        host=8,
        outside=25.6e12 / 8 / 256,
        source=DOCS + "v6e",
    ),
    "tpu7x": Chip(
        kind="TPU7x",
        flops=2307e12,
        mxus=8,
        mxu_side=256,
        hbm=192 * GIB,
        hbm_bandwidth=7400e9,
        network=1200e9 / 2,
        pod=9216,
        axes=3,
        outside=100e9 / 8,
        source=DOCS + "tpu7x; bandwidth of memory: jax's pallas/mosaic/tpu_info.py",
    ),
}
# The topology of all devices of this machine.
LOCAL = "local"
# The largest number of slices. No published run used more than 199. libtpu numbers the
# devices of successive slices 100,000 apart, so 32 bits suffice for 21,474 slices.
MOST_SLICES = 1024


def chip_of(topology: str) -> str:
    """Checks a topology such as `v5e:2x4`, and returns the name of its chip.

    Returns:
      A key of `CHIPS`, or '' for `local`.

    Raises:
      UserError: The topology has another form, its chip is unknown, or the slices are
        too large or too many.
    """
    if topology == LOCAL:
        return ""
    count, star, slice_ = topology.rpartition("*")
    name, colon, shape = slice_.partition(":")
    if name not in CHIPS:
        if star and slice_ == LOCAL:
            hint = f" {LOCAL} means all devices of this machine and is written alone."
        elif star and count.partition(":")[0] in CHIPS:
            hint = " The number of slices comes first."
        else:
            hint = nearest(name, [LOCAL, *CHIPS])
        raise UserError(
            f"There is no topology {topology!r}.{hint} A topology is {LOCAL}, or a chip"
            f" ({', '.join(CHIPS)}) and the shape of a slice, such as v5e:2x4 or"
            " v4:2x2x1, or several such slices: 2*v5e:2x4."
        )
    chip = CHIPS[name]
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        example = "x".join("224"[: chip.axes])
        raise UserError(
            f"The topology {topology!r} has no valid shape of a slice; write, for"
            f" example, {count}{star}{name}:{example}."
        )
    sides = sides_of(topology)
    chips = math.prod(sides)
    # A third side of length 1 is the same as none.
    if len(sides) > chip.axes and sides[-1] > 1:
        raise UserError(
            f"The topology {topology!r} has three sides, but slices of {name} have two;"
            f" write, for example,"
            f" {count}{star}{name}:{sides[0]}x{sides[1] * sides[2]}."
        )
    if chips > chip.pod:
        raise UserError(
            f"The slice {slice_!r} has {chips:,} chips, but a pod of {name} has"
            f" {chip.pod:,}; use several smaller slices, written as 2*{name}:SHAPE."
        )
    if star and not (
        re.fullmatch(r"[1-9]\d{0,9}", count) and int(count) <= MOST_SLICES
    ):
        raise UserError(
            f"The topology {topology!r} has {count!r} slices, which is not a number"
            f" from 1 to {MOST_SLICES:,}; write, for example, 2*{slice_}."
        )
    return name


def slices_of(topology: str) -> int:
    """Returns the number of slices of a topology: 2 for `2*v5e:2x4`."""
    return int(topology.rpartition("*")[0] or 1)


def sides_of(topology: str) -> list[int]:
    """Returns the sides of each slice of a topology: [2, 4] for `v5e:2x4`."""
    return [int(side) for side in topology.partition(":")[2].split("x")]


def chip_of_device(kind: str) -> str:
    """Returns the key of `CHIPS` for JAX's name of a device, or '' if there is none."""
    return next((name for name, chip in CHIPS.items() if chip.kind == kind), "")
