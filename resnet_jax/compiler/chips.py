"""Published peaks of TPU chips, and how their slices are named."""

import dataclasses
import math
import re

from resnet_jax.errors import UserError, nearest

GIB = 2**30
DOCS = "cloud.google.com/tpu/docs/"
# Seconds that a message takes from a chip to its neighbour: an assumption, since no
# figure is published; the order of magnitude is that of the JAX scaling book.
HOP = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What one chip has at most, by its maker's documents.

    Attributes:
      kind: how JAX calls its devices.
      flops: bf16 operations per second.
      mxus, mxu_side: number and side of the arrays that multiply.
      hbm: bytes of memory.
      hbm_bandwidth: bytes per second.
      network: bytes per second that it sends over all its links.
      pod: most chips in one network, and so in a slice.
      axes: of the network's torus.
      host: most chips of a slice that has one host only.
      outside: bytes per second through the data-centre network, which connects slices
        and pods, for each chip; 0: not published.
      config: how libtpu calls the two cores of a chip as one device.
      source: of the figures.
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
        """Cycles per second, at which the arrays reach the published peak.

        An array makes side^2 multiply-adds, two operations each, in a cycle.
        """
        return self.flops / (self.mxus * self.mxu_side**2 * 2)


# Network: the all-reduce bandwidth of a pod by its chips, or half of the bandwidth in
# both directions. Outside: the data-centre bandwidth of a pod by its chips.
# v6e: some versions of its page count two arrays, but then the clock would be 3.5 GHz,
# and libtpu expects more of a matrix product, 369e3 operations a cycle, than two give;
# tpu7x likewise.
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
LOCAL = "local"
# No published run took more than 199 slices. libtpu numbers devices by 100,000 a slice,
# of which 32 bits hold those of 21,474.
MOST_SLICES = 1024


def chip_of(topology: str) -> str:
    """Returns the chip of a topology such as `v5e:2x4`, or '' for `local`.

    Raises:
      UserError: The name is not of this form, or of an unknown chip, or there is no
        slice or number of slices of that size.
    """
    if topology == LOCAL:
        return ""
    count, star, slice_ = topology.rpartition("*")
    chip, colon, shape = slice_.partition(":")
    if chip not in CHIPS:
        known = [LOCAL, *CHIPS]
        if star and slice_ == LOCAL:
            hint = f" {LOCAL} stands alone, for all devices of this machine."
        elif star and count.partition(":")[0] in CHIPS:
            hint = " The number of slices comes first."
        else:
            hint = nearest(chip, known)
        raise UserError(
            f"There is no topology {topology!r}.{hint} It is {LOCAL},"
            f" or a chip ({', '.join(CHIPS)}) and the shape of a slice, such as"
            " v5e:2x4 or v4:2x2x1, or several such slices: 2*v5e:2x4."
        )
    known = CHIPS[chip]
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        sides = "x".join("224"[: known.axes])
        raise UserError(
            f"The topology {topology!r} has no shape of a slice; write"
            f" {count}{star}{chip}:{sides}, say."
        )
    sides = sides_of(topology)
    chips = math.prod(sides)
    # A third side of one chip is none.
    if len(sides) > known.axes and sides[-1] > 1:
        raise UserError(
            f"The topology {topology!r} has three sides, but chips of {chip} lie in"
            f" two; write {count}{star}{chip}:{sides[0]}x{sides[1] * sides[2]}, say."
        )
    if chips > known.pod:
        raise UserError(
            f"The slice {slice_!r} has {chips:,} chips, but a pod of {chip} has"
            f" {known.pod:,}; take several smaller slices, written as 2*{chip}:SHAPE."
        )
    if star and not (
        re.fullmatch(r"[1-9]\d{0,9}", count) and int(count) <= MOST_SLICES
    ):
        raise UserError(
            f"The topology {topology!r} has {count!r} slices, which is not a number"
            f" from 1 to {MOST_SLICES:,}; write 2*{slice_}, say."
        )
    return chip


def slices_of(topology: str) -> int:
    """Returns the number of slices: 2 of `2*v5e:2x4`, 1 of `v5e:2x4`."""
    return int(topology.rpartition("*")[0] or 1)


def sides_of(topology: str) -> list[int]:
    """Returns the sides of each slice of a topology such as `v5e:2x4`."""
    return [int(side) for side in topology.partition(":")[2].split("x")]


def chip_of_device(kind: str) -> str:
    """The chip whose devices JAX calls so; '' if it is none of `CHIPS`."""
    return next((name for name, chip in CHIPS.items() if chip.kind == kind), "")
