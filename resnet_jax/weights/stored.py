"""Tensors in files: their shapes are known before any of their values is read.

A file can claim sizes that no memory holds, so the readers of all formats take names,
shapes and types from its headers alone. These are compared with a network, and then
only the tensors that the network has are read.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator

import numpy as np

from resnet_jax.errors import UserError

# The types whose values are real numbers: a cast to float32 would take any number of
# other types, such as the real parts of complex numbers.
_INTEGERS = (f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))
REAL = {"bfloat16", "float16", "float32", "float64", *_INTEGERS}


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
        if self.dtype not in REAL:
            raise UnreadableError(
                f"{self.file} is refused: the values of {self.name!r} are not real"
                f" numbers but of the type {self.dtype}. Save it as float32."
            )
        with explaining_damage(self.file):
            return np.asarray(self.read(), dtype)


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
            f"{path} cannot be read: {lines[0].rstrip('.')}. Fetch or save it again."
        ) from error
