"""Augmentation of one image, from its file to the pixels that a step takes.

Random choices are a function of a key, which the loader derives from (seed, epoch,
index).
"""

import dataclasses
import functools
import math
from typing import Any

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
    """Crops, resizes and augments an image to `size` x `size` pixels.

    The order is: crop and resize, flip, policy, colour jitter, lighting, erasing,
    ColOut.

    Attributes:
      size: The side of the crop in pixels.
      crop: The kind of crop. `random_resized`: a random box (Szegedy et al. 2014,
        arXiv:1409.4842, section 6). `pad`: a random crop of the padded image (He et al.
        2015, arXiv:1512.03385, section 4.2). `short_side`: a random crop after the
        short side is resized to a random length (the same, section 3.4). `center`: the
        centre after the short side is resized to size / crop_fraction. `five`: that
        centre and the four corners, stacked, for ten-crop evaluation.
      scale: The smallest and largest fraction of the area that `random_resized` keeps.
      ratio: The smallest and largest width / height of a `random_resized` box.
      pad: The number of pixels that `pad` adds on each side.
      pad_mode: The pixels that `pad` adds: `zero`, or `reflect` for its reflection.
      short_side: The smallest and largest length of `short_side` in pixels; all lengths
        are equally likely.
      crop_fraction: The fraction of the resized short side that `center` keeps.
      interpolation: The kind of interpolation, see `resize.resize`. With TensorFlow's,
        `center` crops before it resizes, as TensorFlow's evaluations do.
      flip: True to mirror half of the images.
      decode: The resizing of `random_resized`. `exact`: by Pillow, as in torchvision.
        `fast`: by OpenCV, after a blur where the crop shrinks, and after decoding at
        1/2 or 1/4 scale where the crop is that much larger than the result.
        TensorFlow's interpolations are always exact.
      policy: The name of a random policy, see `policies.parse`; empty for none.
      color_jitter: The widths of brightness, contrast, saturation and hue, see
        `policies.ColorJitter`; zeros for none.
      lighting: The standard deviation of the weights of `image_ops.add_lighting`; 0 for
        none.
      erase: The probability of `crops.erase`.
      erase_mode: `constant` to erase with the mean colour, `pixel` with noise.
      erase_count: The largest number of rectangles that are erased.
      colout: The fraction of the rows and columns that are dropped, as Composer's
        ColOut drops them from single images. The side of the result is
        int((1 - colout) * size), for which the train step is compiled.
      mean: The mean of each channel, in units of 0 to 1, for erasing and for timm's
        policies.
      std: The standard deviation of each channel, in units of 0 to 1, for erasing.
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
        if self.crop == "pad" and self.pad >= self.size:
            raise UserError(
                f"data.pad={self.pad} must be less than data.image_size={self.size},"
                " so that each crop shows a part of the image."
            )
        lengths = (self.size, *self.short_side)
        fits = len(lengths) == 3 and list(lengths) == sorted(lengths)
        if self.crop == "short_side" and not fits:
            raise UserError(
                f"data.short_side={self.short_side} must be a smallest and a largest"
                f" length, at least data.image_size={self.size}."
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
        # Parsed here, so that a wrong name is reported before the data are opened.
        _ = self._policy

    @functools.cached_property
    def side(self) -> int:
        """The side of the result in pixels."""
        return int((1 - self.colout) * self.size)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the result without its channels."""
        return (*((5,) if self.crop == "five" else ()), self.side, self.side)

    @property
    def only_crops(self) -> bool:
        """Tells whether `pad_and_crop` alone augments an image of the right size."""
        other_changes = self.policy, any(self.color_jitter), self.lighting, self.erase
        return self.crop == "pad" and not any(other_changes) and not self.colout

    @functools.cached_property
    def _policy(self) -> policies.Policy | None:
        if not self.policy:
            return None
        resample = pillow_filter(self.interpolation)
        return policies.parse(self.policy, interpolation=resample, mean=self.mean)

    @functools.cached_property
    def _jitter(self) -> policies.ColorJitter:
        brightness, contrast, saturation, hue = map(float, self.color_jitter)
        return policies.ColorJitter(
            brightness=brightness, contrast=contrast, saturation=saturation, hue=hue
        )

    def __call__(
        self, picture: Picture, key: int | None = None
    ) -> UInt8[np.ndarray, "*views {self.side} {self.side} c"]:
        """Returns the augmented pixels of an image.

        Args:
          picture: The image.
          key: The 64-bit key that determines all random choices, if there are any.

        Raises:
          BadImageError: The image cannot be decoded.
        """
        # Nothing reads the generator of an augmentation that is not random.
        rng: Any = None if key is None else np.random.default_rng(int(key))
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
        return self._after_crop(pixels, rng)

    def _after_crop(self, pixels: np.ndarray, rng: Any) -> np.ndarray:
        """Applies all augmentations that follow crop, resize and flip."""
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
        """Takes the crops `pad` of many images at once, each determined by its key."""
        return crops.pad_and_crop(
            pixels, keys, pad=self.pad, mode=self.pad_mode, flip=self.flip
        )

    def _random_resized_crop(
        self, picture: Picture, rng: np.random.Generator
    ) -> np.ndarray:
        box = crops.random_box(rng, picture.size, self.scale, self.ratio)
        left, top, right, bottom = box
        if self.decode == "exact" or self.interpolation not in PILLOW:
            # Pillow's resize(box=...) is not used, since its filters read pixels
            # outside the box.
            return self._resize(picture.part(left, top, right, bottom))
        side = min(right - left, bottom - top)
        shrink = next((k for k in (4, 2) if side >= k * self.size), 1)
        if shrink == 1:
            return self._resize_fast(picture.part(left, top, right, bottom))
        pixels = picture.pixels(shrink)
        # Only JPEGs are decoded smaller. Each decoded pixel then covers shrink x shrink
        # pixels of the image.
        if pixels.shape[1] == picture.size[0]:
            shrink = 1
        left, top = round(left / shrink), round(top / shrink)
        right, bottom = round(right / shrink), round(bottom / shrink)
        return self._resize_fast(pixels[top:bottom, left:right])

    def _resize_fast(self, pixels: np.ndarray) -> np.ndarray:
        return resize_fast(pixels, self.size, self.interpolation)

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        return resize(pixels, (self.size, self.size), self.interpolation)

    def _short_side_crop(
        self, picture: Picture, rng: np.random.Generator
    ) -> np.ndarray:
        least, most = self.short_side
        resized = crops.resized_size(picture.size, int(rng.integers(least, most + 1)))
        left, top = (int(rng.integers(side - self.size + 1)) for side in resized)
        return crops.crop_of_resized(
            picture, resized, (left, top), self.size, self.interpolation
        )

    def _resized_for_crop(self, picture: Picture) -> tuple[int, int]:
        # In floating point, 160 / (160 / 232) is less than 232.
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
        decoded = dataclasses.replace(picture, image=picture.pixels())
        return np.stack(
            [
                crops.crop_of_resized(
                    decoded, (wide, high), corner, self.size, self.interpolation
                )
                for corner in (crops.center_of(wide, high, self.size), *corners)
            ]
        )
