"""Random and central crops of images, random erasing, and ColOut."""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8, UInt64

from resnet_jax.data.decode import Picture
from resnet_jax.data.resize import PILLOW, REACH, resize

# numpy's words for the modes of padding.
PAD_MODES: dict[str, Literal["constant", "reflect"]] = {
    "zero": "constant",
    "reflect": "reflect",
}


def scramble(keys: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Hashes 64-bit numbers one to one by splitmix64 (Steele et al. 2014, OOPSLA)."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ keys >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ keys >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return keys ^ keys >> np.uint64(31)


def random_box(
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draws the box of a random resized crop, as torchvision does.

    The area is uniform in `scale`, the logarithm of width / height uniform in `ratio`.
    If ten such boxes do not fit into the image, the box is the largest centre crop
    whose ratio is allowed.

    Args:
      rng: The generator of random numbers.
      size: The width and height of the image in pixels.
      scale: The smallest and largest fraction of the image's area.
      ratio: The smallest and largest width / height.

    Returns:
      (left, top, right, bottom) in pixels.
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


def pad_and_crop(
    pixels: UInt8[np.ndarray, "n size size c"],
    keys: UInt64[np.ndarray, " n"],
    *,
    pad: int,
    mode: str,
    flip: bool,
) -> UInt8[np.ndarray, "n size size c"]:
    """Takes random crops of many padded images at once, each determined by its key.

    Args:
      pixels: The pixels of the images, which are square.
      keys: The keys of the images.
      pad: The number of pixels that are added on each side.
      mode: The kind of padding, one of PAD_MODES.
      flip: True to mirror half of the crops.
    """
    size = pixels.shape[1]
    widths = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = np.pad(pixels, widths, PAD_MODES[mode])
    # Bits 0 to 23 of the hashed key give the top of the crop, bits 24 to 47 the left,
    # and bit 48 the flip.
    bits = scramble(keys)
    offsets = np.uint64(2 * pad + 1)
    top, left = (
        ((bits >> np.uint64(shift) & np.uint64(0xFFFFFF)) * offsets >> np.uint64(24))
        for shift in (0, 24)
    )
    flipped = bits >> np.uint64(48) & np.uint64(flip)
    result = np.empty_like(pixels)
    rows = zip(top.tolist(), left.tolist(), flipped.tolist(), strict=True)
    for i, (y, x, mirrored) in enumerate(rows):
        crop = padded[i, y : y + size, x : x + size]
        result[i] = crop[:, ::-1] if mirrored else crop
    return result


def resized_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Returns the (width, height) of an image whose short side is resized to `short`.

    The long side is rounded as in torchvision.
    """
    width, height = size
    if width < height:
        return short, int(short * height / width)
    return int(short * width / height), short


def center_of(wide: int, high: int, size: int) -> tuple[int, int]:
    """Returns the (left, top) of the centre crop, rounded as in torchvision."""
    return round((wide - size) / 2), round((high - size) / 2)


def crop_of_resized(
    picture: Picture,
    resized: tuple[int, int],
    corner: tuple[int, int],
    size: int,
    interpolation: str,
) -> UInt8[np.ndarray, "{size} {size} c"]:
    """Returns a square crop of the resized image, resizing only that if possible.

    Args:
      picture: The image.
      resized: The (width, height) to which the image is resized.
      corner: The (left, top) of the square in the resized image.
      size: The side of the square in pixels.
      interpolation: The kind of interpolation, see `resize.resize`.
    """
    (width, height), (wide, high), (left, top) = picture.size, resized, corner
    if (wide, high) == (width, height):
        return picture.part(left, top, left + size, top + size)
    if interpolation not in PILLOW:
        complete = resize(picture.pixels(), resized, interpolation)
        return complete[top : top + size, left : left + size]
    # The crop in pixels of the original image; rounding must not lead outside of it.
    x, y = width / wide, height / high
    right, bottom = (left + size) * x, (top + size) * y
    box = (left * x, top * y, min(right, width), min(bottom, height))
    # Pillow's filters reach this far beyond the box.
    reach = REACH[interpolation]
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
    box = tuple(np.subtract(box, shift).tolist())
    return resize(part, (size, size), interpolation, box)


def erase(
    pixels: UInt8[np.ndarray, "h w c"],
    rng: np.random.Generator,
    *,
    count: int,
    mean: Float[np.ndarray, " c"],
    std: Float[np.ndarray, " c"] | None,
) -> UInt8[np.ndarray, "h w c"]:
    """Erases random rectangles (Zhong et al. 2017, arXiv:1708.04896), as timm does.

    The libraries erase after normalisation, this function before it. Their 0 is the
    rounded mean colour here. Their noise N(0, 1) is mean + std * N(0, 1), rounded and
    clipped to 0 to 255, which clips about 5 % of it with ImageNet's colours.

    Args:
      pixels: The pixels of the image.
      rng: The generator of random numbers.
      count: The largest number of rectangles; one to `count` share the area.
      mean: The mean of each channel, in units of 0 to 1.
      std: The standard deviation of each channel, in units of 0 to 1; None to erase
        with the mean colour instead of noise.
    """
    pixels = pixels.copy()
    height, width, channels = pixels.shape
    number = int(rng.integers(1, count + 1))
    for _ in range(number):
        for _ in range(10):
            area = height * width * rng.uniform(0.02, 1 / 3) / number
            aspect = math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < height and w < width:
                top = int(rng.integers(height - h + 1))
                left = int(rng.integers(width - w + 1))
                levels = np.asarray(mean, np.float32)
                if std is not None:
                    noise = rng.standard_normal((h, w, channels), np.float32)
                    levels = levels + noise * np.asarray(std, np.float32)
                levels = np.rint(255 * levels).clip(0, 255)
                pixels[top : top + h, left : left + w] = levels
                break
    return pixels


def drop_lines(
    pixels: UInt8[np.ndarray, "h w c"], rng: np.random.Generator, side: int
) -> UInt8[np.ndarray, "{side} {side} c"]:
    """Keeps `side` random rows and columns in their order, as Composer's ColOut."""
    rows, columns = (
        np.sort(rng.permutation(length)[:side]) for length in pixels.shape[:2]
    )
    return pixels[rows][:, columns]
