"""What is done to one image, from its file to the pixels that a step takes.

Random choices follow from a key, which the loader makes of (seed, epoch, index).
"""

import dataclasses
import functools
import math

import cv2
import numpy as np
from jaxtyping import UInt8, UInt64

from resnet_jax.data import crops, policies
from resnet_jax.data.decode import Picture
from resnet_jax.data.image_ops import add_lighting, to_image, to_pixels
from resnet_jax.data.resize import (
    INTERPOLATIONS,
    PILLOW,
    pillow_filter,
    resize,
    resize_fast,
)
from resnet_jax.errors import UserError, check_known

TRAIN_CROPS = ("random_resized", "pad", "center", "short_side")
CROPS = (*TRAIN_CROPS, "five")
DECODES = ("fast", "exact")
ERASE_MODES = ("constant", "pixel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Brings an image to `size` x `size`, at random for training.

    In this order: crop and resize, flip, policy, colour jitter, lighting, erasing,
    ColOut.

    Attributes:
      size: side of the crop in pixels.
      crop: `random_resized` (Szegedy et al. 2014, arXiv:1409.4842, section 6),
        `pad` (pixels around, then a random crop; He et al. 2015, section 4.2),
        `short_side` (resize the short side to a random length, then a random crop; He
        et al. 2015, arXiv:1512.03385, section 3.4), `center` (resize the short side to
        size / crop_fraction, then the centre) or `five` (the centre and the four
        corners of that, one behind the other, for a test by ten crops).
      scale: `random_resized`: least and most part of the area.
      ratio: `random_resized`: least and most width / height.
      pad: `pad`: pixels added on each side.
      pad_mode: `pad`: they are `zero`, or `reflect` the image.
      short_side: `short_side`: least and most length, each equally likely.
      crop_fraction: `center`: part of the resized short side that is kept.
      interpolation: see `resize.resize`. With TensorFlow's, `center` cuts out first and
        then resizes, as the evaluations that come from there do.
      flip: whether half of the images are mirrored.
      decode: how `random_resized` resizes: `exact` by Pillow, as torchvision; `fast`
        by OpenCV, behind a blur where it shrinks, and after decoding at 1/2 or 1/4
        scale where the crop is that much larger than the result. TensorFlow's
        interpolations are always exact.
      policy: name of a random policy, see `policies.parse`; empty: none.
      color_jitter: brightness, contrast, saturation and hue, see
        `policies.ColorJitter`; zeros: none.
      lighting: standard deviation of the weights of `ops.add_lighting`; 0: none.
      erase: probability of `crops.erase`; 0: none.
      erase_mode: `constant` (the mean colour) or `pixel` (noise).
      erase_count: most rectangles that are erased.
      colout: part of the rows and columns that are dropped, as Composer's ColOut does
        with single images. Every result has the side int((1 - colout) * size), to
        which the train step is compiled.
      mean, std: of each channel, in units of 0 to 1: for erasing and timm's policies.
    """

    size: int
    crop: str = "center"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 4
    pad_mode: str = "zero"
    short_side: tuple[int, ...] = (256, 480)
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    flip: bool = False
    decode: str = "exact"
    policy: str = ""
    color_jitter: tuple[float | int, ...] = (0.0, 0.0, 0.0, 0.0)
    lighting: float = 0.0
    erase: float = 0.0
    erase_mode: str = "constant"
    erase_count: int = 1
    colout: float = 0.0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        for key, known in (
            ("crop", CROPS),
            ("pad_mode", crops.PAD_MODES),
            ("interpolation", INTERPOLATIONS),
            ("decode", DECODES),
            ("erase_mode", ERASE_MODES),
        ):
            value = getattr(self, key)
            check_known(f"{key} {value!r}", value, known)
        if not 0 < self.crop_fraction <= 1:
            raise UserError(
                f"data.crop_fraction={self.crop_fraction} must be above 0 and at most"
                " 1: the part of the resized side that the crop keeps."
            )
        if self.crop == "pad" and self.pad_mode == "reflect" and self.pad >= self.size:
            raise UserError(
                f"data.pad={self.pad} must be less than data.image_size={self.size}"
                " with data.pad_mode=reflect."
            )
        lengths = (self.size, *self.short_side)
        fits = len(lengths) == 3 and list(lengths) == sorted(lengths)
        if self.crop == "short_side" and not fits:
            raise UserError(
                f"data.short_side={self.short_side} must be a least and a most length,"
                f" at least data.image_size={self.size}."
            )
        jitter = self.color_jitter
        if len(jitter) != 4 or min(jitter) < 0 or jitter[3] > 0.5:
            raise UserError(
                f"data.color_jitter={jitter} must be four numbers of at least 0:"
                " brightness, contrast, saturation, and hue, which is at most 0.5."
            )
        for key, value in (("erase", self.erase), ("colout", self.colout)):
            if not 0 <= value <= 1:
                raise UserError(f"data.{key}={value} must be from 0 to 1.")
        if self.lighting < 0:
            raise UserError(f"data.lighting={self.lighting} must be at least 0.")
        if self.erase_count < 1:
            raise UserError(f"data.erase_count={self.erase_count} must be at least 1.")
        if self.side < 1:
            raise UserError(
                f"data.colout={self.colout} leaves nothing of"
                f" data.image_size={self.size}."
            )
        # Built now, so that a wrong name is told before the data are opened.
        _ = self._policy

    @functools.cached_property
    def side(self) -> int:
        """Side of the result in pixels."""
        return int((1 - self.colout) * self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result, but for its channels."""
        return (*((5,) if self.crop == "five" else ()), self.side, self.side)

    @property
    def only_crops(self) -> bool:
        """Whether `pad_and_crop` is all that is done to an image of the right size."""
        more = self.policy, any(self.color_jitter), self.lighting, self.erase
        return self.crop == "pad" and not any(more) and not self.colout

    @functools.cached_property
    def _policy(self) -> policies.Policy | None:
        if not self.policy:
            return None
        how = pillow_filter(self.interpolation)
        return policies.parse(self.policy, interpolation=how, mean=self.mean)

    @functools.cached_property
    def _jitter(self) -> policies.ColorJitter:
        names = "brightness", "contrast", "saturation", "hue"
        widths = map(float, self.color_jitter)
        return policies.ColorJitter(**dict(zip(names, widths, strict=True)))

    def __call__(
        self, picture: Picture, key: int | None = None
    ) -> UInt8[np.ndarray, "*views {self.side} {self.side} c"]:
        """Returns the pixels; a function of the key, of 64 bits, if it is random."""
        rng = None if key is None else np.random.default_rng(int(key))
        match self.crop:
            case "pad":
                pixels = picture.pixels()
                if pixels.shape[:2] != (self.size, self.size):
                    pixels = self._resize(pixels)
                pixels = self.pad_and_crop(pixels[None], np.array([key], np.uint64))[0]
            case "random_resized":
                pixels = self._random_resized_crop(picture, rng)
            case "short_side":
                pixels = self._short_side_crop(picture, rng)
            case "center":
                pixels = self._center_crop(picture)
            case "five":
                return self._five_crops(picture)
        if self.flip and self.crop != "pad" and rng.random() < 0.5:
            pixels = cv2.flip(pixels, 1).reshape(pixels.shape)
        return self._change(pixels, rng)

    def _change(self, pixels: np.ndarray, rng) -> np.ndarray:
        """All that comes behind the geometry."""
        if self._policy or any(self.color_jitter):
            image = to_image(pixels)
            if self._policy:
                image = self._policy(image, rng)
            if any(self.color_jitter):
                image = self._jitter(image, rng)
            pixels = to_pixels(image)
        if self.lighting:
            pixels = add_lighting(pixels, rng.normal(0, self.lighting, 3))
        if self.erase and rng.random() < self.erase:
            pixels = crops.erase(
                pixels,
                rng,
                count=self.erase_count,
                mean=np.array(self.mean),
                std=np.array(self.std) if self.erase_mode == "pixel" else None,
            )
        if self.colout:
            pixels = crops.drop_lines(pixels, rng, self.side)
        return pixels

    def pad_and_crop(
        self,
        pixels: UInt8[np.ndarray, "n {self.size} {self.size} c"],
        keys: UInt64[np.ndarray, " n"],
    ) -> UInt8[np.ndarray, "n {self.size} {self.size} c"]:
        """The crops `pad` of many images at a time, each by its key."""
        return crops.pad_and_crop(
            pixels, keys, pad=self.pad, mode=self.pad_mode, flip=self.flip
        )

    def _random_resized_crop(self, picture: Picture, rng) -> np.ndarray:
        box = crops.random_box(rng, picture.size, self.scale, self.ratio)
        left, top, right, bottom = box
        if self.decode == "exact" or self.interpolation not in PILLOW:
            # Not Pillow's resize(box=...), which lets pixels outside the box in.
            return self._resize(picture.part(left, top, right, bottom))
        side = min(right - left, bottom - top)
        shrink = next((k for k in (4, 2) if side >= k * self.size), 1)
        if shrink == 1:
            return self._resize_fast(picture.part(left, top, right, bottom))
        pixels = picture.pixels(shrink)
        # Only JPEGs come smaller. Each of their pixels stands for shrink x shrink.
        if pixels.shape[1] == picture.size[0]:
            shrink = 1
        left, top = round(left / shrink), round(top / shrink)
        right, bottom = round(right / shrink), round(bottom / shrink)
        return self._resize_fast(pixels[top:bottom, left:right])

    def _resize_fast(self, pixels: np.ndarray) -> np.ndarray:
        return resize_fast(pixels, self.size, self.interpolation)

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        return resize(pixels, (self.size, self.size), self.interpolation)

    def _short_side_crop(self, picture: Picture, rng) -> np.ndarray:
        least, most = self.short_side
        resized = crops.resized_size(picture.size, int(rng.integers(least, most + 1)))
        corner = tuple(int(rng.integers(side - self.size + 1)) for side in resized)
        return crops.crop_of_resized(
            picture, resized, corner, self.size, self.interpolation
        )

    def _resized_for_crop(self, picture: Picture) -> tuple[int, int]:
        # Of 160 / (160 / 232), floating point makes less than 232.
        short = math.floor(self.size / self.crop_fraction + 1e-6)
        return crops.resized_size(picture.size, short)

    def _center_crop(self, picture: Picture) -> np.ndarray:
        if self.interpolation not in PILLOW:
            width, height = picture.size
            side = max(int(self.crop_fraction * min(width, height)), 1)
            left, top = (width - side + 1) // 2, (height - side + 1) // 2
            return self._resize(picture.part(left, top, left + side, top + side))
        wide, high = self._resized_for_crop(picture)
        corner = crops.center_of(wide, high, self.size)
        return crops.crop_of_resized(
            picture, (wide, high), corner, self.size, self.interpolation
        )

    def _five_crops(self, picture: Picture) -> np.ndarray:
        wide, high = self._resized_for_crop(picture)
        right, bottom = wide - self.size, high - self.size
        corners = ((0, 0), (right, 0), (0, bottom), (right, bottom))
        whole = dataclasses.replace(picture, image=picture.pixels())
        return np.stack(
            [
                crops.crop_of_resized(
                    whole, (wide, high), corner, self.size, self.interpolation
                )
                for corner in (crops.center_of(wide, high, self.size), *corners)
            ]
        )
