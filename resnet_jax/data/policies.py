"""Random augmentation policies: RandAugment, AutoAugment, TrivialAugment and others.

A policy draws the operations on an image, and their amounts, from a numpy Generator,
which the loader seeds with the image's key.
"""

import abc
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from resnet_jax.data.image_ops import Step, apply, to_image, to_pixels
from resnet_jax.errors import UserError, nearest

# The width and height of an image in pixels.
Size = tuple[int, int]
Rng = np.random.Generator

GEOMETRY = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
ENHANCE = ("brightness", "color", "contrast", "sharpness")
# Names of policies that an error message can propose.
EXAMPLES = (
    *("rand-m7-mstd0.5-inc1", "rand-m9-mstd0.5-inc1", "torchvision_rand_n2_m9"),
    *("trivial_wide", "auto_imagenet", "auto_cifar10", "original", "augmix"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(abc.ABC):
    """A random sequence of operations.

    Attributes:
      resample: The interpolation of geometric operations.
      fill: The colour that geometric operations bring in from outside, one level per
        channel.
    """

    resample: Image.Resampling = Image.Resampling.NEAREST
    fill: int | tuple[int, ...] = 0

    @abc.abstractmethod
    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """Returns random operations, in order, for an image of a size."""

    def __call__(self, image: Image.Image, rng: Rng) -> Image.Image:
        """Applies random operations to an image of mode RGB or L."""
        return self._apply(image, self.draw(rng, image.size))

    def _apply(self, image: Image.Image, steps: Sequence[Step]) -> Image.Image:
        for op, amount in steps:
            image = apply(image, op, amount, resample=self.resample, fill=self.fill)
        return image


# Policies with the semantics of torchvision (transforms/autoaugment.py).


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extents:
    """The amounts of torchvision's operations at full strength.

    Attributes:
      shear: The tangent of the angle.
      shift: The translation as a fraction of the side, or in pixels if it is above 1.
      rotate: The angle in degrees.
      enhance: The distance of factors from 1.
      bits: The numbers of bits that `posterize` keeps at strength 0 and at strength 1.
    """

    shear: float
    shift: float
    rotate: float
    enhance: float
    bits: tuple[int, int]

    def step(self, op: str, strength: float, sign: int, size: Size) -> Step:
        """Returns an operation and its amount.

        Args:
          op: The name of the operation.
          strength: The strength, 0 to 1.
          sign: The direction, +1 or -1, of operations that have two.
          size: The width and height of the image.
        """
        signed = sign * strength
        match op:
            case "shear_x" | "shear_y":
                return op, signed * self.shear
            case "translate_x" | "translate_y":
                side = size[op == "translate_y"] if self.shift <= 1 else 1
                # torchvision moves whole pixels to the right and down.
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
      ops: The number of operations, all of which are applied.
      magnitude: The magnitude of all of them, 0 to 30: one of 31 bins.
    """

    ops: int = 2
    magnitude: int = 9

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """Returns random operations, in order, for an image of a size."""
        drawn = rng.integers(len(RAND_OPS), size=self.ops)
        strength = self.magnitude / 30
        return [RAND.step(RAND_OPS[i], strength, _sign(rng), size) for i in drawn]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrivialWide(Policy):
    """TrivialAugment, wide (Müller and Hutter 2021, arXiv:2103.10158).

    It applies one operation, whose magnitude is one of 31 bins.
    """

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """Returns random operations, in order, for an image of a size."""
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
# magnitude. Operations without a strength ignore the magnitude.
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
      table: Pairs of operations with their probabilities and magnitudes, 0 to 9. One
        pair is applied to each image.
    """

    table: tuple[tuple[tuple[str, float, int], ...], ...] = AUTO_IMAGENET

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """Returns random operations, in order, for an image of a size."""
        return [
            RAND.step(op, magnitude / 9, _sign(rng), size)
            for op, probability, magnitude in self.table[rng.integers(len(self.table))]
            if rng.random() < probability
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugMix(Policy):
    """AugMix (Hendrycks et al. 2020, arXiv:1912.02781) with torchvision's defaults.

    The results of several chains of one to three operations are averaged with the
    image, by random weights. torchvision applies them to tensors, which it rounds in
    another way than Pillow does here.

    Attributes:
      severity: The number of magnitudes, which are the lowest of 10 bins.
      chains: The number of chains.
    """

    severity: int = 3
    chains: int = 3

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """Returns the random operations of one chain."""
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
        """Averages an image of mode RGB or L with the results of random chains."""
        # The weight of the image and those of the chains are uniform, as alpha is 1.
        own = rng.random()
        weights = (1 - own) * rng.dirichlet(np.ones(self.chains))
        mixed = own * to_pixels(image).astype(np.float32)
        for weight in weights:
            chain = self._apply(image, self.draw(rng, image.size))
            mixed += np.float32(weight) * to_pixels(chain)
        # Truncated instead of rounded, as in torchvision.
        return to_image(mixed.astype(np.uint8))


# Policies with the semantics of timm (data/auto_augment.py).

TIMM_OPS = (
    *("autocontrast", "equalize", "invert", "rotate", "posterize", "solarize"),
    *("solarize_add", "color", "contrast", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timm(Policy):
    """The base of timm's policies: its operations at a magnitude of 0 to 10.

    Attributes:
      std: The standard deviation of the noise on the magnitude; inf draws it uniformly
        from 0 to the magnitude.
      most: The largest magnitude, to which the noise is clipped.
      increasing: True if larger magnitudes of posterize, solarize and the enhancing
        operations shall always change the image more.
    """

    std: float = 0.0
    most: float = 10.0
    increasing: bool = False

    def noisy_step(self, op: str, magnitude: float | int, rng: Rng, size: Size) -> Step:
        """Returns an operation and its amount at a magnitude with noise."""
        if self.std == math.inf:
            magnitude = rng.uniform(0, magnitude)
        elif self.std:
            magnitude = rng.normal(magnitude, self.std)
        strength = min(max(magnitude, 0.0), self.most) / 10
        return self.step(op, strength, _sign(rng), size)

    def step(self, op: str, strength: float, sign: int, size: Size) -> Step:
        """Returns an operation and its amount; see `Extents.step`."""
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
        """Returns the number of bits that `posterize` keeps at a strength of 0 to 1."""
        bits = int(4 * strength)
        return max(4 - bits, 0) if self.increasing else bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmRand(Timm):
    """RandAugment as timm does it.

    Attributes:
      magnitude: The magnitude of all operations, 0 to 10.
      layers: The number of operations that are chosen at random.
      probability: The probability with which each of them is applied.
    """

    magnitude: float = 10.0
    layers: int = 2
    probability: float = 0.5

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """Returns random operations, in order, for an image of a size."""
        return [
            self.noisy_step(TIMM_OPS[i], self.magnitude, rng, size)
            for i in rng.integers(len(TIMM_OPS), size=self.layers)
            if rng.random() < self.probability
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimmOriginal(Timm):
    """AutoAugment's policy for ImageNet as timm does it under the name `original`."""

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """Returns random operations, in order, for an image of a size."""
        return [
            self.noisy_step(op, magnitude, rng, size)
            for op, probability, magnitude in AUTO_IMAGENET[rng.integers(25)]
            if rng.random() < probability
        ]

    def bits(self, strength: float) -> int:
        """Returns the number of bits that `posterize` keeps: 4 or more."""
        # As in the paper.
        return 4 + int(4 * strength)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ColorJitter(Policy):
    """Random brightness, contrast, saturation and hue, in torchvision's random order.

    Factors are uniform from 1 - width to 1 + width, and at least 0.

    Attributes:
      brightness: The width of the factor of the brightness.
      contrast: The width of the factor of the contrast.
      saturation: The width of the factor of the saturation.
      hue: The largest rotation of the hue as a fraction of a full turn, at most 0.5;
        rotations are uniform in both directions.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def draw(self, rng: Rng, size: Size) -> list[Step]:
        """Returns random operations, in order, for an image of a size."""
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


# The letters that timm writes before the numbers of its policies, the fields of
# `TimmRand` that they set, and the functions that parse them.
TIMM_KEYS: dict[str, tuple[str, Callable[[str], Any]]] = {
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
    """Returns the policy that a name describes.

    Args:
      text: `rand-m7-n2-mstd0.5-inc1` (timm's RandAugment, as timm writes it; also with
        p and mmax), `original` (timm's AutoAugment; also with mstd),
        `torchvision_rand_n2_m9`, `trivial_wide`, `auto_imagenet`, `auto_cifar10` or
        `augmix` (torchvision's).
      interpolation: The interpolation of geometric operations.
      mean: The mean of each channel, in units of 0 to 1, with which timm fills the
        area outside of the image; torchvision fills it with black.

    Raises:
      UserError: There is no such policy, or a number is out of its range.
    """
    first, *settings = text.split("-")
    if first in ("rand", "original"):
        keys = TIMM_KEYS if first == "rand" else {"mstd": TIMM_KEYS["mstd"]}
        fields: dict[str, Any] = {}
        for part in settings:
            match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?|inf)", part)
            if not match or match[1] not in keys:
                raise UserError(
                    f"There is no {part!r} in data.policy={text!r}; it takes"
                    f" {', '.join(keys)}, as in {EXAMPLES[0]}."
                )
            name, convert = keys[match[1]]
            try:
                fields[name] = convert(match[2])
            except ValueError:
                raise UserError(
                    f"{part!r} in data.policy={text!r} must be a whole number."
                ) from None
        if fields.get("std", 0.0) > 100:
            fields["std"] = math.inf
        kind = TimmRand if first == "rand" else TimmOriginal
        fill = tuple(min(255, round(255 * level)) for level in mean)
        return kind(**fields, resample=interpolation, fill=fill)
    match = re.fullmatch(r"torchvision_rand(?:_n(\d+))?(?:_m(\d+))?", text)
    if match:
        ops, magnitude = int(match[1] or 2), int(match[2] or 9)
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
