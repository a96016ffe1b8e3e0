"""Random policies: which operations are done to an image, and how much of each.

Each draws from a numpy Generator, so that the image's key decides.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from resnet_jax.data.image_ops import Step, apply, to_image, to_pixels
from resnet_jax.errors import UserError, nearest

Size = tuple[int, int]  # width and height
Rng = np.random.Generator

GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
ENHANCE = ("brightness", "color", "contrast", "sharpness")
# Of these, half of the amounts are negative, or below 1.
SIGNED = (*GEOMETRY, *ENHANCE)
# Names that an error can propose.
EXAMPLES = (
    *("rand-m7-mstd0.5-inc1", "rand-m9-mstd0.5-inc1", "torchvision_rand_n2_m9"),
    *("trivial_wide", "auto_imagenet", "auto_cifar10", "original", "augmix"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(abc.ABC):
    """A random sequence of operations.

    Attributes:
      resample: how geometric operations interpolate.
      fill: colour of what they bring in from outside, one level a channel.
    """

    resample: Image.Resampling = Image.Resampling.NEAREST
    fill: int | tuple[int, ...] = 0

    @abc.abstractmethod
    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """The operations to do, in order, to an image of a size."""

    def __call__(self, image: Image.Image, rng: Rng) -> Image.Image:
        """Does operations that are drawn; `image` is RGB or L."""
        return self._apply(image, self.draw(rng, image.size))

    def _apply(self, image: Image.Image, steps: Sequence[Step]) -> Image.Image:
        for op, amount in steps:
            image = apply(image, op, amount, resample=self.resample, fill=self.fill)
        return image


# Policies with the semantics of torchvision (transforms/autoaugment.py).


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extents:
    """What torchvision's operations do at full strength.

    Attributes:
      shear: tangent of the angle.
      shift: part of the side, or pixels where it is above 1.
      rotate: degrees.
      enhance: how far factors are from 1.
      bits: that `posterize` keeps at no strength and at full strength.
    """

    shear: float
    shift: float
    rotate: float
    enhance: float
    bits: tuple[int, int]

    def step(self, op: str, strength: float, sign: int, size: Size) -> Step:
        """An operation at a strength of 0 to 1; `sign`, +-1, counts where it can."""
        signed = sign * strength
        match op:
            case "shear_x" | "shear_y":
                return op, signed * self.shear
            case "translate_x" | "translate_y":
                side = size[op == "translate_y"] if self.shift <= 1 else 1
                # To the right and down, in whole pixels.
                return op, -int(signed * self.shift * side)
            case "rotate":
                return op, signed * self.rotate
            case "brightness" | "color" | "contrast" | "sharpness":
                return op, 1 + signed * self.enhance
            case "posterize":
                most, least = self.bits
                return op, most - round(strength * (most - least))
            case "solarize":
                return op, 255 * (1 - strength)
            case _:
                return op, 0.0


RAND = Extents(shear=0.3, shift=150 / 331, rotate=30.0, enhance=0.9, bits=(8, 4))
WIDE = Extents(shear=0.99, shift=32.0, rotate=135.0, enhance=0.99, bits=(8, 2))
AUGMIX = Extents(shear=0.3, shift=1 / 3, rotate=30.0, enhance=0.9, bits=(4, 0))
AUGMIX_OPS = (*GEOMETRY, "posterize", "solarize", "autocontrast", "equalize", *ENHANCE)
RAND_OPS = ("identity", *AUGMIX_OPS)


def _sign(rng: Rng) -> int:
    return 1 - 2 * int(rng.integers(2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchvisionRand(Policy):
    """RandAugment (Cubuk et al. 2019, arXiv:1909.13719) as torchvision does it.

    Attributes:
      ops: number of operations, each of which is done.
      magnitude: of all of them, 0 to 30: one of 31 bins.
    """

    ops: int = 2
    magnitude: int = 9

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """The operations to do, in order, to an image of a size."""
        drawn = rng.integers(len(RAND_OPS), size=self.ops)
        strength = self.magnitude / 30
        return [RAND.step(RAND_OPS[i], strength, _sign(rng), size) for i in drawn]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrivialWide(Policy):
    """TrivialAugment, wide (Müller and Hutter 2021, arXiv:2103.10158): one operation.

    Its magnitude is one of 31 bins.
    """

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """The operations to do, in order, to an image of a size."""
        op, strength = RAND_OPS[rng.integers(len(RAND_OPS))], rng.integers(31) / 30
        return [WIDE.step(op, strength, _sign(rng), size)]


def _table(text: str) -> tuple[tuple[tuple[str, float, int], ...], ...]:
    """Parses lines of two operations with their probability and magnitude."""
    rows = []
    for line in text.strip().splitlines():
        pair = [words.split() for words in line.split(",")]
        rows.append(tuple((op, float(p), int(m)) for op, p, m in pair))
    return tuple(rows)


# Cubuk et al. 2018 (arXiv:1805.09501), tables 7 and 9: operation, probability,
# magnitude. Operations without a strength pass over the magnitude.
AUTO_IMAGENET = _table("""
    posterize .4 8, rotate .6 9
    solarize .6 5, autocontrast .6 5
    equalize .8 8, equalize .6 3
    posterize .6 7, posterize .6 6
    equalize .4 7, solarize .2 4
    equalize .4 4, rotate .8 8
    solarize .6 3, equalize .6 7
    posterize .8 5, equalize 1 2
    rotate .2 3, solarize .6 8
    equalize .6 8, posterize .4 6
    rotate .8 8, color .4 0
    rotate .4 9, equalize .6 2
    equalize 0 7, equalize .8 8
    invert .6 4, equalize 1 8
    color .6 4, contrast 1 8
    rotate .8 8, color 1 2
    color .8 8, solarize .8 7
    sharpness .4 7, invert .6 8
    shear_x .6 5, equalize 1 9
    color .4 0, equalize .6 3
    equalize .4 7, solarize .2 4
    solarize .6 5, autocontrast .6 5
    invert .6 4, equalize 1 8
    color .6 4, contrast 1 8
    equalize .8 8, equalize .6 3
""")
AUTO_CIFAR10 = _table("""
    invert .1 7, contrast .2 6
    rotate .7 2, translate_x .3 9
    sharpness .8 1, sharpness .9 3
    shear_y .5 8, translate_y .7 9
    autocontrast .5 8, equalize .9 2
    shear_y .2 7, posterize .3 7
    color .4 3, brightness .6 7
    sharpness .3 9, brightness .7 9
    equalize .6 5, equalize .5 1
    contrast .6 7, sharpness .6 5
    color .7 7, translate_x .5 8
    equalize .3 7, autocontrast .4 8
    translate_y .4 3, sharpness .2 6
    brightness .9 6, color .2 8
    solarize .5 2, invert 0 3
    equalize .2 0, autocontrast .6 0
    equalize .2 8, equalize .6 4
    color .9 9, equalize .6 6
    autocontrast .8 4, solarize .2 8
    brightness .1 3, color .7 0
    solarize .4 5, autocontrast .9 3
    translate_y .9 9, translate_y .7 9
    autocontrast .9 2, solarize .8 3
    equalize .8 8, invert .1 3
    translate_y .7 9, autocontrast .9 1
""")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchvisionAuto(Policy):
    """AutoAugment (Cubuk et al. 2018, arXiv:1805.09501) as torchvision does it.

    Attributes:
      table: pairs of operations with their probabilities and magnitudes, 0 to 9; one
        pair is drawn.
    """

    table: tuple[tuple[tuple[str, float, int], ...], ...] = AUTO_IMAGENET

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """The operations to do, in order, to an image of a size."""
        return [
            RAND.step(op, magnitude / 9, _sign(rng), size)
            for op, probability, magnitude in self.table[rng.integers(len(self.table))]
            if rng.random() < probability
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugMix(Policy):
    """AugMix (Hendrycks et al. 2020, arXiv:1912.02781) with torchvision's defaults.

    Three chains of one to three operations each, mixed with the image by random
    weights. torchvision's operations on tensors round otherwise than Pillow's here.

    Attributes:
      severity: magnitudes are among the first so many of 10 bins.
      chains: number of chains.
    """

    severity: int = 3
    chains: int = 3

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """The operations of one chain."""
        return [
            AUGMIX.step(
                AUGMIX_OPS[rng.integers(len(AUGMIX_OPS))],
                rng.integers(self.severity) / 9,
                _sign(rng),
                size,
            )
            for _ in range(rng.integers(1, 4))
        ]

    def __call__(self, image: Image.Image, rng: Rng) -> Image.Image:
        """Mixes chains of operations that are drawn; `image` is RGB or L."""
        # The image's own weight, and the chains'; both uniform, as alpha is 1.
        own = rng.random()
        weights = (1 - own) * rng.dirichlet(np.ones(self.chains))
        mixed = own * to_pixels(image).astype(np.float32)
        for weight in weights:
            chain = self._apply(image, self.draw(rng, image.size))
            mixed += np.float32(weight) * to_pixels(chain)
        # Cut off, not rounded, as torchvision's.
        return to_image(mixed.astype(np.uint8))


# Policies with the semantics of timm (data/auto_augment.py).

TIMM_OPS = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize"),
    *("solarize_add", "color", "contrast", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timm(Policy):
    """How timm's operations depend on a magnitude of 0 to 10.

    Attributes:
      std: of the noise on the magnitude; inf: it is uniform from 0 on.
      most: the largest magnitude, to which the noise is clipped.
      increasing: whether more of posterize, solarize and the enhancers always changes
        more of the image.
    """

    std: float = 0.0
    most: float = 10.0
    increasing: bool = False

    def drawn(self, op: str, magnitude: float | int, rng: Rng, size: Size) -> Step:
        """An operation at a magnitude, with its noise."""
        if self.std == math.inf:
            magnitude = rng.uniform(0, magnitude)
        elif self.std:
            magnitude = rng.normal(magnitude, self.std)
        strength = min(max(magnitude, 0.0), self.most) / 10
        return self.step(op, strength, _sign(rng), size)

    def step(self, op: str, strength: float, sign: int, size: Size) -> Step:
        """An operation at a strength of 0 to 1; `sign`, +-1, counts where it can."""
        signed = sign * strength
        match op:
            case "shear_x" | "shear_y":
                return op, 0.3 * signed
            case "translate_x" | "translate_y":
                return op, 0.45 * signed * size[op == "translate_y"]
            case "rotate":
                return op, 30 * signed
            case "brightness" | "color" | "contrast" | "sharpness":
                if self.increasing:
                    return op, max(0.1, 1 + 0.9 * signed)
                return op, 0.1 + 1.8 * strength
            case "posterize":
                return op, self.bits(strength)
            case "solarize":
                level = min(256, int(256 * strength))
                return op, 256 - level if self.increasing else level
            case "solarize_add":
                return op, min(128, int(110 * strength))
            case _:
                return op, 0.0

    def bits(self, strength: float) -> int:
        """Bits that `posterize` keeps at a strength."""
        bits = int(4 * strength)
        return max(4 - bits, 0) if self.increasing else bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmRand(Timm):
    """RandAugment as timm does it.

    Attributes:
      magnitude: of all operations.
      layers: number of operations that are drawn.
      probability: with which each of them is done.
    """

    magnitude: float = 10.0
    layers: int = 2
    probability: float = 0.5

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """The operations to do, in order, to an image of a size."""
        return [
            self.drawn(TIMM_OPS[i], self.magnitude, rng, size)
            for i in rng.integers(len(TIMM_OPS), size=self.layers)
            if rng.random() < self.probability
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmOriginal(Timm):
    """AutoAugment's policy for ImageNet as timm does it under the name `original`."""

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """The operations to do, in order, to an image of a size."""
        return [
            self.drawn(op, magnitude, rng, size)
            for op, probability, magnitude in AUTO_IMAGENET[rng.integers(25)]
            if rng.random() < probability
        ]

    def bits(self, strength: float) -> int:
        """Bits that `posterize` keeps at a strength: four or more, as in the paper."""
        return 4 + int(4 * strength)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitter(Policy):
    """Random brightness, contrast, saturation and hue in random order, by torchvision.

    Attributes:
      brightness, contrast, saturation: factors are uniform within so much of 1, and
        at least 0.
      hue: turns are uniform within so much of 0; at most 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """The operations to do, in order, to an image of a size."""
        del size
        widths = {
            "brightness": self.brightness,
            "contrast": self.contrast,
            "color": self.saturation,
        }
        steps = [
            (op, rng.uniform(max(1 - width, 0.0), 1 + width))
            for op, width in widths.items()
            if width
        ]
        if self.hue:
            steps.append(("hue", rng.uniform(-self.hue, self.hue)))
        return [steps[i] for i in rng.permutation(len(steps))]


# timm's letters for the numbers of its policies, and their types.
TIMM_KEYS = {
    "m": ("magnitude", float),
    "n": ("layers", int),
    "p": ("probability", float),
    "mstd": ("std", float),
    "mmax": ("most", float),
    "inc": ("increasing", lambda text: bool(int(text))),
}


def parse(
    text: str, *, interpolation: Image.Resampling, mean: Sequence[float]
) -> Policy:
    """Makes a policy of its name.

    Args:
      text: `rand-m7-n2-mstd0.5-inc1` (timm's RandAugment, in its own words; also p and
        mmax), `original` (timm's AutoAugment; also mstd), `torchvision_rand_n2_m9`,
        `trivial_wide`, `auto_imagenet`, `auto_cifar10` or `augmix` (torchvision's).
      interpolation: of geometric operations, as in the libraries' own recipes.
      mean: of each channel, in units of 0 to 1: what timm fills up with; torchvision
        fills up with black.

    Raises:
      UserError: there is no such policy, or a number is out of its range.
    """
    first, *rest = text.split("-")
    if first in ("rand", "original"):
        keys = TIMM_KEYS if first == "rand" else {"mstd": TIMM_KEYS["mstd"]}
        fields = {}
        for part in rest:
            found = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?|inf)", part)
            if not found or found[1] not in keys:
                raise UserError(
                    f"There is no {part!r} in data.policy={text!r}; it takes"
                    f" {', '.join(keys)}, as in {EXAMPLES[0]}."
                )
            name, convert = keys[found[1]]
            try:
                fields[name] = convert(found[2])
            except ValueError:
                raise UserError(
                    f"{part!r} in data.policy={text!r} must be a whole number."
                ) from None
        if fields.get("std", 0.0) > 100:
            fields["std"] = math.inf
        kind = TimmRand if first == "rand" else TimmOriginal
        fill = tuple(min(255, round(255 * level)) for level in mean)
        return kind(**fields, resample=interpolation, fill=fill)
    found = re.fullmatch(r"torchvision_rand(?:_n(\d+))?(?:_m(\d+))?", text)
    if found:
        ops, magnitude = int(found[1] or 2), int(found[2] or 9)
        if magnitude > 30:
            raise UserError(f"m in data.policy={text!r} must be from 0 to 30.")
        return TorchvisionRand(ops=ops, magnitude=magnitude, resample=interpolation)
    match text:
        case "trivial_wide":
            return TrivialWide(resample=interpolation)
        case "auto_imagenet":
            return TorchvisionAuto(table=AUTO_IMAGENET, resample=interpolation)
        case "auto_cifar10":
            return TorchvisionAuto(table=AUTO_CIFAR10, resample=interpolation)
        case "augmix":
            return AugMix(resample=interpolation)
    raise UserError(f"There is no data.policy={text!r}.{nearest(text, EXAMPLES)}")
