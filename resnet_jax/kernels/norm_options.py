"""The options of batch norm over ghost batches, which its implementations share."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.kernels.arrays import Image


@dataclasses.dataclass(frozen=True)
class GhostBatchNorm:
    """Parameters of a ghost batch norm that are not arrays.

    Attributes:
      size: Number of consecutive examples that share statistics.
      epsilon: Number that is added to the variance.
      activation: Function that is applied to the normalised values, or None.
      dtype: Type of the output.
    """

    size: int
    epsilon: float
    activation: Callable | None
    dtype: DTypeLike

    def pixels(self, x: Image) -> float:
        """Returns the pixels per ghost batch, as a float because int32 may overflow."""
        return float(self.size * x.shape[1] * x.shape[2])

    def activate(self, x: Image) -> Image:
        """Applies the activation, if there is one, and casts to the output's dtype."""
        return (self.activation(x) if self.activation else x).astype(self.dtype)


def repeat_for_examples(
    values: Float[Array, "g c"], size: int
) -> Float[Array, "b 1 1 c"]:
    """Repeats each ghost batch's values for each of its `size` examples."""
    return jnp.repeat(values, size, axis=0)[:, None, None]
