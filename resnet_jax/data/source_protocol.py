"""The interface of a data source: random access to images and labels."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split: what `train` needs of your own data.

    `torchvision.datasets.ImageFolder(...)` is a source, too.

    Attributes:
      classes: The names of the classes, in the order of the labels.

    Examples:
      >>> import numpy as np
      >>> class Squares:
      ...     classes = ("dark", "bright")
      ...     def __len__(self):
      ...         return 100
      ...     def __getitem__(self, index):
      ...         label = index % 2
      ...         return np.full((32, 32, 3), 255 * label, np.uint8), label
      >>> isinstance(Squares(), Source)
      True
    """

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, in the order of the labels."""
        ...

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Returns an image and its label, the same ones at every call.

        The image is the bytes of an image file, uint8 pixels [h, w, c] or [h, w], or an
        image of Pillow's. The label is the index of a class.
        """
        ...


@runtime_checkable
class NamedSource(Source, Protocol):
    """A source with a title and a checksum, whose examples have names.

    Its images are bytes of image files or uint8 pixels [h, w, c]. A label is an int, or
    an int array padded with -1 where images have several labels.

    Attributes:
      classes: The names of the classes, in the order of the labels.
      title: The name of the split in messages and summaries.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        ...

    @property
    def title(self) -> str:
        """The name of the split in messages and summaries."""
        ...

    def name(self, index: int) -> str:
        """Returns the name of an example in messages."""
        ...

    def digest(self) -> str:
        """Returns a checksum of the examples' names, order and labels.

        It reads no image and does not depend on the place of the data.
        """
        ...


def checksum(*facts: object) -> str:
    """Returns the SHA-256 of facts that JSON can write."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
