"""Normalisation of images, by which pixels become a network's input."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8


def normalize(
    image: UInt8[Array, "b h w c"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike,
) -> Float[Array, "b h w c"]:
    """Returns (image / 255 - mean) / std, computed in float32.

    Args:
      image: The pixels, from 0 to 255.
      mean: The mean of each channel, from 0 to 1.
      std: The standard deviation of each channel, in the same unit.
      dtype: The type of the result.

    Examples:
      >>> pixels = jax.numpy.full((1, 1, 1, 2), 255, "uint8")
      >>> normalize(pixels, (0.5, 0.0), (0.5, 0.25), "float32").ravel().tolist()
      [1.0, 4.0]
    """
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    return (image.astype(jnp.float32) * scale - shift).astype(dtype)
