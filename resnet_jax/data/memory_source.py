"""A data source whose images are in memory."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import numpy as np

from resnet_jax.data.source_protocol import NamedSource, checksum


# Without repr: Grain takes the repr of its arguments, and that of all images takes
# minutes.
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MemorySource:
    """Images and labels in memory; see `source_protocol.NamedSource`.

    Attributes:
      images: The bytes of image files, or uint8 pixels [h, w, c].
      labels: The label of each image; () means zeros.
      classes: The names of the classes, in the order of the labels.
      title: The name of the split in messages and summaries.
      origin: The source that was decoded, which knows the examples' names, or None.
    """

    images: Sequence[bytes | np.ndarray] | np.ndarray
    labels: Sequence[int] | np.ndarray = ()
    classes: tuple[str, ...] = ("0",)
    title: str = "memory"
    origin: NamedSource | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int | np.ndarray]:
        label = self.labels[index] if len(self.labels) else 0
        return self.images[index], label if np.ndim(label) else int(label)

    def name(self, index: int) -> str:
        """Returns the name of an example in messages."""
        return self.origin.name(index) if self.origin else f"{self.title}/{index}"

    def digest(self) -> str:
        """Returns the checksum of the origin, or of the images and labels."""
        if self.origin:
            return self.origin.digest()
        labels = np.asarray(self.labels).tolist()
        return checksum(self.title, self.classes, len(self), labels, self._content)

    @functools.cached_property
    def _content(self) -> int:
        """The checksum of all images."""
        content = 0
        for image in self.images:
            # The bytes of a view, such as numpy.moveaxis returns, have another order.
            if not isinstance(image, bytes):
                image = np.ascontiguousarray(image).tobytes()
            content = zlib.crc32(image, content)
        return content
