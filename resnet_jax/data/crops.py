"""What part of an image is taken."""

import math

import numpy as np
from jaxtyping import UInt8, UInt64

from resnet_jax.data.decode import Picture
from resnet_jax.data.resize import PILLOW, REACH, resize

PAD_MODES = {"zero": "constant", "reflect": "reflect"}  # and numpy's words for them


def mix(keys: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Scrambles 64-bit numbers one to one; splitmix64 (Steele et al. 2014, OOPSLA)."""
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


def pad_and_crop(
    pixels: UInt8[np.ndarray, "n size size c"],
    keys: UInt64[np.ndarray, " n"],
    *,
    pad: int,
    mode: str,
    flip: bool,
) -> UInt8[np.ndarray, "n size size c"]:
    """Random crops of many padded images at a time, each by its key.

    Args:
      pixels: of the images, which are square.
      keys: of the images.
      pad: pixels that are added on each side.
      mode: what they are: one of PAD_MODES.
      flip: whether half of the crops are mirrored.
    """
    size = pixels.shape[1]
    around = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    padded = np.pad(pixels, around, PAD_MODES[mode])
    # Bits 0 to 23, 24 to 47 and 48 of a number that depends on all of the key's.
    bits = mix(keys)
    places = np.uint64(2 * pad + 1)
    top, left = (
        ((bits >> np.uint64(shift) & np.uint64(0xFFFFFF)) * places >> np.uint64(24))
        for shift in (0, 24)
    )
    flipped = bits >> np.uint64(48) & np.uint64(flip)
    result = np.empty_like(pixels)
    places = zip(top.tolist(), left.tolist(), flipped.tolist(), strict=True)
    for i, (y, x, mirrored) in enumerate(places):
        crop = padded[i, y : y + size, x : x + size]
        result[i] = crop[:, ::-1] if mirrored else crop
    return result


def resized_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """(width, height) to which a short side brings an image, as torchvision rounds."""
    width, height = size
    if width < height:
        return short, int(short * height / width)
    return int(short * width / height), short


def center_of(wide: int, high: int, size: int) -> tuple[int, int]:
    """(left, top) of the centre crop of a size, rounded as torchvision does."""
    return round((wide - size) / 2), round((high - size) / 2)


def crop_of_resized(
    picture: Picture,
    resized: tuple[int, int],
    corner: tuple[int, int],
    size: int,
    interpolation: str,
) -> UInt8[np.ndarray, "{size} {size} c"]:
    """Resizes an image and cuts a square out of it, in one go where it can.

    Args:
      picture: the image.
      resized: (width, height) to which it is brought.
      corner: (left, top) of the square in the resized image.
      size: side of the square.
      interpolation: see `resize`.
    """
    (width, height), (wide, high), (left, top) = picture.size, resized, corner
    if (wide, high) == (width, height):
        return picture.part(left, top, left + size, top + size)
    if interpolation not in PILLOW:
        whole = resize(picture.pixels(), resized, interpolation)
        return whole[top : top + size, left : left + size]
    # What is kept, in the pixels of the image; rounding must not lead outside.
    x, y = width / wide, height / high
    right, bottom = (left + size) * x, (top + size) * y
    box = (left * x, top * y, min(right, width), min(bottom, height))
    # Pillow's filters reach this far beyond it.
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
    mean: np.ndarray,
    std: np.ndarray | None,
) -> UInt8[np.ndarray, "h w c"]:
    """Erases rectangles (Zhong et al. 2017, arXiv:1708.04896), drawn as timm does.

    The libraries erase after normalisation, here it comes later: what is 0 there is
    the mean colour here, rounded, and noise N(0, 1) is mean + std * N(0, 1), rounded
    and clipped to 0 to 255: with ImageNet's colours, about 5 % of it are clipped.

    Args:
      pixels: of the image.
      rng: random numbers.
      count: there are one to so many rectangles, which share the area.
      mean, std: of each channel, in units of 0 to 1; without `std` there is no noise.
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
    """Keeps `side` random rows and columns in their order: Composer's ColOut."""
    rows, columns = (
        np.sort(rng.permutation(length)[:side]) for length in pixels.shape[:2]
    )
    return pixels[rows][:, columns]
