"""Decodes a split into memory, so that an epoch costs no decoding."""

import concurrent.futures
import logging
import os

import numpy as np
import psutil

from resnet_jax.config.defaults import MAX_PIXELS
from resnet_jax.data.decode import Picture
from resnet_jax.data.memory_source import MemorySource
from resnet_jax.data.source_protocol import NamedSource
from resnet_jax.data.sources import DigitsSource, FakeSource
from resnet_jax.errors import BadImageError, UserError

log = logging.getLogger(__name__)

MODES = ("small", "ram", "none")
# The longest side of a small image in pixels: that of Tiny-ImageNet, the largest of the
# usual data sets of small images.
SMALL_SIDE = 64
# Fractions of the free memory that `small` and `ram` may take.
SMALL_FRACTION, RAM_FRACTION = 0.25, 0.8
# Sources whose images are in memory, without a file to decode.
IN_MEMORY = FakeSource | DigitsSource | MemorySource
# The number of images from which the size of the decoded split is estimated.
SAMPLE = 64


def cached(
    source: NamedSource, channels: int, mode: str, max_pixels: int = MAX_PIXELS
) -> NamedSource:
    """Returns the split decoded into memory if `mode` and the memory allow it.

    Otherwise it returns the split as it is. An image that cannot be decoded stays
    encoded, so that the error is raised when the image is used.

    Args:
      source: The split.
      channels: The number of channels of the pixels, 1 or 3.
      mode: `small` for images of at most 64 px that take no more than a quarter of the
        free memory, `ram` for any images, or `none`.
      max_pixels: The number of pixels beyond which a file cannot be decoded.

    Raises:
      UserError: The images take more than 80 % of the free memory, with `ram`.
    """
    if mode == "none" or isinstance(source, IN_MEMORY):
        return source
    side, total = estimate(source, channels, max_pixels)
    free = psutil.virtual_memory().available
    if mode == "small" and (side > SMALL_SIDE or total > SMALL_FRACTION * free):
        return source
    figures = f"{source.title} takes about {total / 2**30:.2f} GiB decoded"
    if total > RAM_FRACTION * free:
        raise UserError(
            f"{figures}, and {free / 2**30:.2f} GiB are free; leave out"
            " --config.data.cache=ram."
        )
    if mode == "ram":
        log.warning("%s; decoding them into memory.", figures)
    return _decode_all(source, channels, max_pixels)


def estimate(
    source: NamedSource, channels: int, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Estimates the decoded size of a split from 64 of its images.

    Returns:
      The longest side of these images in pixels, and the bytes of all images.
    """
    places = np.linspace(0, len(source) - 1, SAMPLE).astype(int)
    sizes = []
    for index in np.unique(places).tolist():
        try:
            image, _ = source[index]
            name = source.name(index)
            sizes.append(Picture(image, channels, name, max_pixels).size)
        except BadImageError:
            continue
    if not sizes:
        return 0, 0
    sides = np.asarray(sizes)
    mean = sides.prod(axis=1).mean() * channels
    return int(sides.max()), int(mean * len(source))


def _decode_all(source: NamedSource, channels: int, max_pixels: int) -> MemorySource:
    def decode(index: int):
        image, label = source[index]
        try:
            name = source.name(index)
            return Picture(image, channels, name, max_pixels).pixels(), label
        except BadImageError:
            return image, label

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        images, labels = zip(*pool.map(decode, range(len(source))), strict=True)
    have_one_shape = len({getattr(image, "shape", None) for image in images}) == 1
    return MemorySource(
        np.stack(images) if have_one_shape else images,
        np.asarray(labels, np.int32),
        source.classes,
        source.title,
        source,
    )
