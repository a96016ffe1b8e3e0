"""Per-image geometry: what part of an image is taken, and to what size it is brought.

Random choices come from a numpy generator that the loader keys by (seed, epoch,
index); pixels are resampled by Pillow.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from resnet_jax.errors import UserError, nearest

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
CROPS = ("random_resized", "pad", "center")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Brings a decoded image to `size` x `size`, at random for training.

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
    """

    size: int
    crop: str = "center"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    pad: int = 4
    crop_fraction: float = 0.875
    interpolation: str = "bilinear"
    flip: bool = False

    def __post_init__(self):
        for key, known in (("crop", CROPS), ("interpolation", INTERPOLATIONS)):
            value = getattr(self, key)
            if value not in known:
                raise UserError(f"There is no {key} {value!r}.{nearest(value, known)}")
        if not 0 < self.crop_fraction <= 1:
            raise UserError(
                f"data.crop_fraction={self.crop_fraction} must be above 0 and at most"
                " 1: the part of the resized side that the crop keeps."
            )

    def __call__(
        self, image: Image.Image, rng: np.random.Generator | None
    ) -> UInt8[np.ndarray, "size size c"]:
        """Returns the pixels; `rng` may be None if nothing is random."""
        if self.crop == "random_resized":
            box = random_box(rng, image.size, self.scale, self.ratio)
            # Not resize(box=...), which lets pixels outside the box in at its edges.
            image = self._resize(image.crop(box), (self.size, self.size))
        elif self.crop == "pad":
            image = self._pad_and_crop(image, rng)
        else:
            image = self._center_crop(image)
        if self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image)
        return pixels[:, :, None] if pixels.ndim == 2 else pixels

    def _resize(self, image, size: tuple[int, int]) -> Image.Image:
        return image.resize(size, INTERPOLATIONS[self.interpolation])

    def _pad_and_crop(self, image, rng: np.random.Generator) -> Image.Image:
        image = self._resize(image, (self.size, self.size))
        left, top = rng.integers(-self.pad, self.pad + 1, 2)
        # Pillow fills with zeros what lies outside the image.
        return image.crop((left, top, left + self.size, top + self.size))

    def _center_crop(self, image) -> Image.Image:
        short = math.floor(self.size / self.crop_fraction)
        width, height = image.size
        if width < height:
            size = short, int(short * height / width)
        else:
            size = int(short * width / height), short
        image = self._resize(image, size)
        # torchvision rounds the offset in this way.
        left = round((size[0] - self.size) / 2)
        top = round((size[1] - self.size) / 2)
        return image.crop((left, top, left + self.size, top + self.size))


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
