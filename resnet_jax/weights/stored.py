"""Tensors in files: their shapes are known before any of their values is read.

A file can claim sizes that no memory holds, so the readers of all formats take names,
shapes and types from its headers alone. These are compared with a network, and then
only the tensors that the network has are read.
"""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from resnet_jax.errors import UserError
from resnet_jax.persistence.storage import Path

# The largest size of a header, a card or a list of files in bytes. The names of ten
# thousand tensors have about one MiB.
MAX_HEADER = 2**24


class UnreadableError(UserError):
    """A file of weights that cannot be read; the message names it."""


@dataclasses.dataclass(frozen=True, repr=False)
class StoredTensor:
    """A tensor in a file, whose values are read when it is made an array.

    `numpy.asarray(tensor, numpy.float32)` reads it, or raises `UnreadableError`. The
    file stays open for as long as one of its tensors is in use.

    Attributes:
      file: The path of the file.
      name: The name of the tensor in the file.
      shape: The length of each axis, as the file's headers declare it.
      dtype: The name of the type of its values.
      read: Returns the values.
    """

    file: os.PathLike
    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        with explaining_damage(self.file):
            value = np.asarray(self.read(), dtype)
            if value.shape != self.shape:
                raise ValueError(f"{self.name!r} has another shape than it declares")
            return value


@contextlib.contextmanager
def explaining_damage(path: os.PathLike) -> Iterator[None]:
    """Raises UnreadableError in place of any error while a file is read."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    # Readers of damaged files raise errors of any type.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UnreadableError(
            f"{path} cannot be read: {lines[0][:200].rstrip('.')}. Fetch or save it"
            " again."
        ) from error


def read_text(path: Path) -> str:
    """Returns the text of a small file; raises UnreadableError for another one."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_HEADER + 1)
    except OSError as error:
        raise UnreadableError(
            f"{path} cannot be read: {error.strerror}. Check its permissions."
        ) from error
    if len(content) > MAX_HEADER:
        raise UnreadableError(
            f"{path} has more than {MAX_HEADER // 2**20} MiB, which is too much for the"
            " description of weights. Correct or remove it."
        )
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise UnreadableError(
            f"{path} is not text in UTF-8. Correct or remove it."
        ) from None


def parse_object(text: str, path: Path) -> Mapping[str, Any]:
    """Parses a JSON object.

    Args:
      text: The JSON.
      path: The file that it is from.

    Raises:
      UnreadableError: The text is not a JSON object; the message names the file.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(
            f"{path} is not valid JSON ({error}). Correct or remove it."
        ) from None
    if not isinstance(content, Mapping):
        raise UnreadableError(
            f"{path} has a {type(content).__name__} in place of a JSON object. Correct"
            " or remove it."
        )
    return content
