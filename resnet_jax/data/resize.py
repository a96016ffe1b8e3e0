"""Resizing of pixels, with the arithmetic of the library that a recipe comes from."""

import functools

import cv2
import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image

from resnet_jax.data.image_ops import to_image, to_pixels

# Antialiased, as torchvision does with images.
PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# What tf.image.resize gives with antialias=False, its default, or with True.
TENSORFLOW = (
    *("tf_bilinear", "tf_bicubic"),
    *("tf_bilinear_antialias", "tf_bicubic_antialias"),
)
INTERPOLATIONS = (*PILLOW, *TENSORFLOW)
# Half widths of Pillow's filters, in pixels of the smaller image.
REACH = {"bilinear": 1, "bicubic": 2}
CV2_INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}

# Threads belong to the loader; OpenCV's own would fight with them.
cv2.setNumThreads(0)


def pillow_filter(interpolation: str) -> Image.Resampling:
    """Pillow's filter of that name, for what Pillow alone can do, such as turning."""
    return PILLOW["bicubic" if "bicubic" in interpolation else "bilinear"]


def resize(
    pixels: UInt8[np.ndarray, "h w c"],
    size: tuple[int, int],
    interpolation: str,
    box: tuple[float, float, float, float] | None = None,
) -> UInt8[np.ndarray, "high wide c"]:
    """Resizes pixels.

    TensorFlow's results are floats, which may lie outside of 0 to 255; here they are
    rounded and clipped.

    Args:
      pixels: of the image.
      size: (wide, high) of the result.
      interpolation: one of INTERPOLATIONS.
      box: (left, top, right, bottom), the part of the image that is wanted, of which
        filters reach out; Pillow's alone.
    """
    if interpolation in PILLOW:
        return to_pixels(to_image(pixels).resize(size, PILLOW[interpolation], box))
    if interpolation == "tf_bilinear":
        # OpenCV's pixels lie as TensorFlow's do. On floats, for it rounds weights on
        # integers.
        resized = cv2.resize(pixels.astype(np.float32), size)
    elif interpolation == "tf_bicubic":
        resized = _resize_keys(pixels, size)
    else:
        # Pillow's filters and TensorFlow's are the same; on floats, Pillow does not
        # round between its two passes.
        resample = pillow_filter(interpolation)
        channels = np.moveaxis(pixels.astype(np.float32), -1, 0)
        resized = np.stack(
            [Image.fromarray(channel).resize(size, resample) for channel in channels],
            axis=-1,
        )
    resized = resized.reshape(*size[::-1], pixels.shape[-1])
    return np.rint(resized).clip(0, 255).astype(np.uint8)


def _resize_keys(
    pixels: UInt8[np.ndarray, "h w c"], size: tuple[int, int]
) -> Float32[np.ndarray, "high wide c"]:
    """Keys's cubic convolution with a = -1/2, not widened where the image shrinks.

    Our own, for OpenCV has a = -3/4 and Pillow a = -1/2 with a filter that is widened.
    """
    rows, weights = _keys_taps(pixels.shape[0], size[1])
    high = sum(
        weights[:, tap, None, None] * pixels[rows[:, tap]].astype(np.float32)
        for tap in range(4)
    )
    columns, weights = _keys_taps(pixels.shape[1], size[0])
    return sum(weights[:, tap, None] * high[:, columns[:, tap]] for tap in range(4))


@functools.lru_cache(maxsize=256)
def _keys_taps(
    source: int, target: int
) -> tuple[Int64[np.ndarray, "target 4"], Float32[np.ndarray, "target 4"]]:
    """Which pixels of a row each pixel of its resized row is made of, and by how much.

    Keys 1981, equation 15. As in TensorFlow, offsets are multiples of 1/1024, and what
    would lie outside of the row has no weight.
    """
    # In float32, so that what lies between two multiples is rounded as there.
    center = (np.arange(target, dtype=np.float32) + 0.5) * np.float32(source / target)
    center -= 0.5
    first = np.floor(center).astype(np.int64)
    offset = np.rint((center - first) * 1024) / 1024
    taps = np.arange(-1, 3)
    x = np.abs(taps - offset[:, None])
    weights = np.where(
        x <= 1,
        1.5 * x**3 - 2.5 * x**2 + 1,
        -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2,
    )
    places = first[:, None] + taps
    weights *= (places >= 0) & (places < source)
    weights /= weights.sum(axis=1, keepdims=True)
    return places.clip(0, source - 1), weights.astype(np.float32)


def resize_fast(
    pixels: UInt8[np.ndarray, "h w c"], size: int, interpolation: str
) -> UInt8[np.ndarray, "{size} {size} c"]:
    """Resizes by OpenCV to a square, behind a blur where it shrinks the image."""
    height, width, channels = pixels.shape
    high, wide = max(height / size, 1.0), max(width / size, 1.0)
    how = CV2_INTERPOLATIONS[interpolation]
    if max(high, wide) > 1:
        if interpolation == "bilinear" and max(high, wide) <= 2:
            pixels = cv2.sepFilter2D(pixels, -1, _widen(wide), _widen(high))
        else:
            how = cv2.INTER_AREA
    resized = cv2.resize(pixels, (size, size), interpolation=how)
    return resized.reshape(size, size, channels)


def _widen(factor: float) -> Float32[np.ndarray, "3"]:
    """A blur that makes OpenCV's linear filter as wide as one that shrinks has to be.

    A triangle of half width `factor` has the variance factor^2 / 6. The linear filter
    that OpenCV samples with, however much it shrinks, has 1/6, and the blur the rest.
    """
    side = (factor**2 - 1) / 12
    return np.array([side, 1 - 2 * side, side], np.float32)
