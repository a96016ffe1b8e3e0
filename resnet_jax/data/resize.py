"""Resizes pixels with the arithmetic of the library from which a recipe comes."""

import functools

import cv2
import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image

from resnet_jax.data.image_ops import to_image, to_pixels

# Pillow's filters, which antialias; torchvision resizes images with them.
PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# tf.image.resize with antialias=False, its default, and with antialias=True.
TENSORFLOW = (
    *("tf_bilinear", "tf_bicubic"),
    *("tf_bilinear_antialias", "tf_bicubic_antialias"),
)
INTERPOLATIONS = (*PILLOW, *TENSORFLOW)
# The half widths of Pillow's filters, in pixels of the smaller image.
REACH = {"bilinear": 1, "bicubic": 2}
CV2_INTERPOLATIONS = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}

# The loader decodes in threads of its own, with which OpenCV's would compete.
cv2.setNumThreads(0)


def pillow_filter(interpolation: str) -> Image.Resampling:
    """Returns Pillow's filter for an interpolation, for example for rotations."""
    return PILLOW["bicubic" if "bicubic" in interpolation else "bilinear"]


def resize(
    pixels: UInt8[np.ndarray, "h w c"],
    size: tuple[int, int],
    interpolation: str,
    box: tuple[float, float, float, float] | None = None,
) -> UInt8[np.ndarray, "high wide c"]:
    """Resizes pixels.

    TensorFlow's results are floats, which may lie outside of 0 to 255. Here they are
    rounded and clipped.

    Args:
      pixels: The pixels of the image.
      size: The (width, height) of the result.
      interpolation: The kind of interpolation, one of INTERPOLATIONS.
      box: The part (left, top, right, bottom) of the image that is resized; None for
        all of it. Filters also read pixels around the box. Only Pillow's
        interpolations take it.
    """
    if interpolation in PILLOW:
        return to_pixels(to_image(pixels).resize(size, PILLOW[interpolation], box))
    if interpolation == "tf_bilinear":
        # OpenCV places pixels as TensorFlow does. On integers it would round their
        # weights, so it gets floats.
        resized = cv2.resize(pixels.astype(np.float32), size)
    elif interpolation == "tf_bicubic":
        resized = _resize_keys(pixels, size)
    else:
        # Pillow's filters are TensorFlow's. On integers Pillow would round between its
        # two passes, so it gets floats.
        resample = pillow_filter(interpolation)
        channels = np.moveaxis(pixels.astype(np.float32), -1, 0)
        resized = np.stack(
            [
                np.asarray(Image.fromarray(channel).resize(size, resample))
                for channel in channels
            ],
            axis=-1,
        )
    resized = resized.reshape(*size[::-1], pixels.shape[-1])
    return np.rint(resized).clip(0, 255).astype(np.uint8)


def _resize_keys(
    pixels: UInt8[np.ndarray, "h w c"], size: tuple[int, int]
) -> Float32[np.ndarray, "high wide c"]:
    """Resizes by Keys's cubic convolution with a = -1/2, without antialiasing.

    No kept library computes it: OpenCV has a = -3/4, and Pillow widens the filter where
    the image shrinks.
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
    """Returns the source pixels of each pixel of a resized row, and their weights.

    The weights are those of Keys 1981, equation 15. As in TensorFlow, offsets are
    multiples of 1/1024, and pixels outside of the row have no weight.
    """
    # In float32, so that offsets between two multiples are rounded as in TensorFlow.
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
    """Resizes to a square by OpenCV, after a blur where the image shrinks."""
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
    """Returns the blur that makes OpenCV's linear filter wide enough for shrinking.

    The filter should be a triangle of half width `factor`, whose variance is
    factor^2 / 6. OpenCV's linear filter has the variance 1/6 at every factor; the blur
    adds the rest.
    """
    side = (factor**2 - 1) / 12
    return np.array([side, 1 - 2 * side, side], np.float32)
