"""Per-image geometry: what part of an image is taken, and to what size it is brought.

Random choices follow from a key, which the loader makes of (seed, epoch, index).
"""

import dataclasses
import math

import cv2
import numpy as np
from jaxtyping import Float32, UInt8, UInt64
from PIL import Image

from resnet_jax.data.decode import Picture
from resnet_jax.errors import UserError, nearest

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# Half widths of the filters, in pixels of the smaller image.
REACH = {"bilinear": 1, "bicubic": 2}
CROPS = ("random_resized", "pad", "center")
DECODES = ("fast", "exact")

# Threads belong to the loader; OpenCV's own would fight with them.
cv2.setNumThreads(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Brings an image to `size` x `size`, at random for training.

    Attributes:
      size: side of the result in pixels.
      crop: `random_resized` (Szegedy et al. 2014, arXiv:1409.4842, section 6),
        `pad` (zeros around, then a random crop; He et al. 2015, section 4.2) or
        `center` (resize the short side to size / crop_fraction, then the centre).
      scale: `random_resized`: least and most part of the area.
      ratio: `random_resized`: least and most width / height.
      pad: `pad`: pixels of zeros on each side.
      crop_fraction: `center`: part of the resized short side that is kept.
      interpolation: `bilinear` or `bicubic`, antialiased as Pillow does.
      flip: whether half of the images are mirrored.
      decode: how `random_resized` resizes: `exact` by Pillow, as torchvision; `fast`
        by OpenCV, behind a blur where it shrinks, and after decoding at 1/2 or 1/4
        scale where the crop is that much larger than the result.
    """

    size: int
    crop: str = "center"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 4
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    flip: bool = False
    decode: str = "exact"

    def __post_init__(self):
        for key, known in (
            ("crop", CROPS),
            ("interpolation", INTERPOLATIONS),
            ("decode", DECODES),
        ):
            value = getattr(self, key)
            if value not in known:
                raise UserError(f"There is no {key} {value!r}.{nearest(value, known)}")
        if not 0 < self.crop_fraction <= 1:
            raise UserError(
                f"data.crop_fraction={self.crop_fraction} must be above 0 and at most"
                " 1: the part of the resized side that the crop keeps."
            )

    def __call__(
        self, picture: Picture, key: int | None = None
    ) -> UInt8[np.ndarray, "{self.size} {self.size} c"]:
        """Returns the pixels; a function of the key, of 64 bits, if it is random."""
        if self.crop == "pad":
            pixels = picture.pixels()
            if pixels.shape[:2] != (self.size, self.size):
                pixels = self._resize(pixels)
            return self.pad_and_crop(pixels[None], np.array([key], np.uint64))[0]
        rng = None if key is None else np.random.default_rng(int(key))
        if self.crop == "random_resized":
            pixels = self._random_resized_crop(picture, rng)
        else:
            pixels = self._center_crop(picture)
        if self.flip and rng.random() < 0.5:
            pixels = cv2.flip(pixels, 1).reshape(pixels.shape)
        return pixels

    def pad_and_crop(
        self,
        pixels: UInt8[np.ndarray, "n {self.size} {self.size} c"],
        keys: UInt64[np.ndarray, " n"],
    ) -> UInt8[np.ndarray, "n {self.size} {self.size} c"]:
        """The crops `pad` of many images at a time, each by its key."""
        n, size, pad = len(pixels), self.size, self.pad
        padded = np.zeros((n, size + 2 * pad, size + 2 * pad, pixels.shape[-1]), "u1")
        padded[:, pad : pad + size, pad : pad + size] = pixels
        # Bits 0 to 23, 24 to 47 and 48 of a number that depends on all of the key's.
        bits = mix(keys)
        places = np.uint64(2 * pad + 1)
        top, left = (
            ((bits >> np.uint64(shift) & np.uint64(0xFFFFFF)) * places >> np.uint64(24))
            for shift in (0, 24)
        )
        flipped = bits >> np.uint64(48) & np.uint64(self.flip)
        result = np.empty_like(pixels)
        places = zip(top.tolist(), left.tolist(), flipped.tolist(), strict=True)
        for i, (y, x, flip) in enumerate(places):
            crop = padded[i, y : y + size, x : x + size]
            result[i] = crop[:, ::-1] if flip else crop
        return result

    def _random_resized_crop(self, picture: Picture, rng) -> np.ndarray:
        left, top, right, bottom = random_box(rng, picture.size, self.scale, self.ratio)
        if self.decode == "exact":
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
        height, width, channels = pixels.shape
        high, wide = max(height / self.size, 1.0), max(width / self.size, 1.0)
        how = CV2_INTERPOLATIONS[self.interpolation]
        if max(high, wide) > 1:
            if self.interpolation == "bilinear" and max(high, wide) <= 2:
                pixels = cv2.sepFilter2D(pixels, -1, _widen(wide), _widen(high))
            else:
                how = cv2.INTER_AREA
        resized = cv2.resize(pixels, (self.size, self.size), interpolation=how)
        return resized.reshape(self.size, self.size, channels)

    def _resize(self, pixels: np.ndarray, box=None) -> np.ndarray:
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels)
        resized = image.resize(
            (self.size, self.size), INTERPOLATIONS[self.interpolation], box=box
        )
        return np.asarray(resized).reshape(self.size, self.size, -1)

    def _center_crop(self, picture: Picture) -> np.ndarray:
        short = math.floor(self.size / self.crop_fraction)
        width, height = picture.size
        if width < height:
            wide, high = short, int(short * height / width)
        else:
            wide, high = int(short * width / height), short
        # torchvision rounds the offset in this way.
        left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
        if (wide, high) == (width, height):
            return picture.part(left, top, left + self.size, top + self.size)
        # What is kept, in the pixels of the image; rounding must not lead outside.
        x, y = width / wide, height / high
        right, bottom = (left + self.size) * x, (top + self.size) * y
        box = (left * x, top * y, min(right, width), min(bottom, height))
        # Pillow's filters reach this far beyond it.
        reach = REACH[self.interpolation]
        reach_x, reach_y = (math.ceil(reach * max(step, 1)) + 1 for step in (x, y))
        first_x = max(math.floor(box[0]) - reach_x, 0)
        first_y = max(math.floor(box[1]) - reach_y, 0)
        part = picture.part(
            first_x,
            first_y,
            min(math.ceil(box[2]) + reach_x, width),
            min(math.ceil(box[3]) + reach_y, height),
        )
        shift = (first_x, first_y, first_x, first_y)
        return self._resize(part, tuple(np.subtract(box, shift).tolist()))


def mix(keys: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Scrambles 64-bit numbers one to one; splitmix64 (Steele et al. 2014, OOPSLA)."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ keys >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ keys >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return keys ^ keys >> np.uint64(31)


CV2_INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


def _widen(factor: float) -> Float32[np.ndarray, "3"]:
    """A blur that makes OpenCV's linear filter as wide as one that shrinks has to be.

    A triangle of half width `factor` has the variance factor^2 / 6. The linear filter
    that OpenCV samples with, however much it shrinks, has 1/6, and the blur the rest.
    """
    side = (factor**2 - 1) / 12
    return np.array([side, 1 - 2 * side, side], np.float32)


def random_box(
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """A random part of an image: (left, top, right, bottom) in pixels.

    Area uniform in `scale`, log of width / height uniform in `ratio`; ten tries,
    then the largest centre crop whose ratio is allowed, as torchvision does.
    """
    width, height = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w + 1))
            top = int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h
