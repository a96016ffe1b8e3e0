"""A split held in memory, decoded, so that an epoch costs no decoding."""

import concurrent.futures
import dataclasses
import functools
import logging
import os
import zlib
from collections.abc import Sequence

import numpy as np
import psutil

from resnet_jax.data.decode import Picture
from resnet_jax.data.sources import DigitsSource, FakeSource, NamedSource, checksum
from resnet_jax.errors import BadImageError, UserError

log = logging.getLogger(__name__)

MODES = ("small", "ram", "none")
# What counts as a small image: Tiny-ImageNet's are the largest of the usual ones.
SMALL_SIDE = 64
# Parts of the memory that is free which may be taken without and with being asked.
UNASKED, ASKED = 0.25, 0.8
SAMPLE = 64


# No repr: Grain takes one of whatever it is given, which of all images takes minutes.
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MemorySource:
    """Images and labels in memory; see `sources.NamedSource`.

    Attributes:
      images: bytes of image files, or uint8 pixels [h, w, c].
      labels: one each; () means zeros.
      classes: names of the classes.
      where: what to call the split.
      origin: the source that knows the examples' names, or None.
    """

    images: Sequence[bytes | np.ndarray] | np.ndarray
    labels: Sequence[int] | np.ndarray = ()
    classes: tuple[str, ...] = ("0",)
    where: str = "memory"
    origin: NamedSource | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        label = self.labels[index] if len(self.labels) else 0
        return self.images[index], label if np.ndim(label) else int(label)

    def name(self, index: int) -> str:
        return self.origin.name(index) if self.origin else f"{self.where}/{index}"

    def digest(self) -> str:
        if self.origin:
            return self.origin.digest()
        labels = np.asarray(self.labels).tolist()
        return checksum(self.where, self.classes, len(self), labels, self._content)

    @functools.cached_property
    def _content(self) -> int:
        """Checksum of all images."""
        content = 0
        for image in self.images:
            # A view, such as that of numpy.moveaxis, has its bytes in another order.
            data = image if isinstance(image, bytes) else np.ascontiguousarray(image)
            content = zlib.crc32(data, content)
        return content


def cached(source: NamedSource, channels: int, mode: str) -> NamedSource:
    """Returns the split in memory if `mode` and the memory allow, else as it is.

    An image that cannot be decoded stays encoded, so that it is told when it is used.

    Args:
      source: the split.
      channels: of the pixels, 1 or 3.
      mode: `small`: images of at most 64 px that take no more than a quarter of the
        memory that is free; `ram`: any images; `none`.

    Raises:
      UserError: the images of a split take more than 80 % of the memory that is free.
    """
    in_memory = FakeSource | DigitsSource | MemorySource
    if mode == "none" or isinstance(source, in_memory):
        return source
    side, total = estimate(source, channels)
    free = psutil.virtual_memory().available
    if mode == "small" and (side > SMALL_SIDE or total > UNASKED * free):
        return source
    figures = f"{source.where} takes about {total / 2**30:.2f} GiB decoded"
    if total > ASKED * free:
        raise UserError(
            f"{figures}, of {free / 2**30:.2f} GiB that are free; leave out"
            " --config.data.cache=ram."
        )
    if mode == "ram":
        log.warning("%s, which are decoded into memory.", figures)
    return _decode_all(source, channels)


def estimate(source: NamedSource, channels: int) -> tuple[int, int]:
    """The longest side of some images in pixels, and the bytes of all, decoded."""
    places = np.linspace(0, len(source) - 1, SAMPLE).astype(int)
    sizes = []
    for index in np.unique(places).tolist():
        try:
            image, _ = source[index]
            sizes.append(Picture(image, channels, source.name(index)).size)
        except BadImageError:
            continue
    if not sizes:
        return 0, 0
    sides = np.asarray(sizes)
    mean = sides.prod(axis=1).mean() * channels
    return int(sides.max()), int(mean * len(source))


def _decode_all(source: NamedSource, channels: int) -> MemorySource:
    def decode(index: int):
        image, label = source[index]
        try:
            return Picture(image, channels, source.name(index)).pixels(), label
        except BadImageError:
            return image, label

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        images, labels = zip(*pool.map(decode, range(len(source))), strict=True)
    if len({getattr(image, "shape", None) for image in images}) == 1:
        images = np.stack(images)
    return MemorySource(
        images, np.asarray(labels, np.int32), source.classes, source.where, source
    )
