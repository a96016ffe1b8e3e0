"""Per-image geometry: what part of an image is taken, and to what size it is brought.

Random choices come from a numpy generator that the loader keys by (seed, epoch,
index).
"""

import dataclasses
import math

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from resnet_jax.data.decode import Picture
from resnet_jax.errors import UserError, nearest

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
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
        by OpenCV, which averages areas where it shrinks, after decoding at 1/2 or
        1/4 scale where the crop is that much larger than the result.
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
        self, picture: Picture, rng: np.random.Generator | None
    ) -> UInt8[np.ndarray, "{self.size} {self.size} c"]:
        """Returns the pixels; `rng` may be None if nothing is random."""
        if self.crop == "random_resized":
            pixels = self._random_resized_crop(picture, rng)
        elif self.crop == "pad":
            pixels = self._pad_and_crop(picture, rng)
        else:
            pixels = self._center_crop(picture)
        if self.flip and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return pixels

    def _random_resized_crop(self, picture: Picture, rng) -> np.ndarray:
        left, top, right, bottom = random_box(rng, picture.size, self.scale, self.ratio)
        if self.decode == "exact":
            # Not Pillow's resize(box=...), which lets pixels outside the box in.
            return self._resize(picture.pixels()[top:bottom, left:right])
        side = min(right - left, bottom - top)
        shrink = next((k for k in (4, 2) if side >= k * self.size), 1)
        pixels = picture.pixels(shrink)
        # What came may be whole: only JPEGs are decoded smaller.
        factor = pixels.shape[1] / picture.size[0]
        left, top, right, bottom = (
            round(edge * factor) for edge in (left, top, right, bottom)
        )
        crop = pixels[top:bottom, left:right]
        shrinks = min(crop.shape[:2]) > self.size
        how = cv2.INTER_AREA if shrinks else CV2_INTERPOLATIONS[self.interpolation]
        resized = cv2.resize(crop, (self.size, self.size), interpolation=how)
        return resized.reshape(self.size, self.size, -1)

    def _resize(self, pixels: np.ndarray, box=None) -> np.ndarray:
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels)
        resized = image.resize(
            (self.size, self.size), INTERPOLATIONS[self.interpolation], box=box
        )
        return np.asarray(resized).reshape(self.size, self.size, -1)

    def _pad_and_crop(self, picture: Picture, rng: np.random.Generator) -> np.ndarray:
        pixels = picture.pixels()
        if pixels.shape[:2] != (self.size, self.size):
            pixels = self._resize(pixels)
        left, top = rng.integers(-self.pad, self.pad + 1, 2).tolist()
        size = self.size
        result = np.zeros_like(pixels)
        result[
            max(-top, 0) : size - max(top, 0), max(-left, 0) : size - max(left, 0)
        ] = pixels[max(top, 0) : size + min(top, 0), max(left, 0) : size + min(left, 0)]
        return result

    def _center_crop(self, picture: Picture) -> np.ndarray:
        pixels = picture.pixels()
        short = math.floor(self.size / self.crop_fraction)
        height, width = pixels.shape[:2]
        if width < height:
            wide, high = short, int(short * height / width)
        else:
            wide, high = int(short * width / height), short
        # torchvision rounds the offset in this way.
        left, top = round((wide - self.size) / 2), round((high - self.size) / 2)
        if (wide, high) == (width, height):
            return pixels[top : top + self.size, left : left + self.size]
        # Pillow computes no more than the part that is kept.
        x, y = width / wide, height / high
        right, bottom = (left + self.size) * x, (top + self.size) * y
        # Rounding must not lead outside.
        box = (left * x, top * y, min(right, width), min(bottom, height))
        return self._resize(pixels, box)


CV2_INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}


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
