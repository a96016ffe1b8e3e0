"""Max pooling on CPUs, where XLA's windows and their gradient are slow."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from resnet_jax.kernels.arrays import Image, Output, accumulation_dtype
from resnet_jax.kernels.cpu.windows import (
    MovedValues,
    Values,
    fusion_barrier,
    moves_values,
    pad,
    taps,
)
from resnet_jax.kernels.geometry import Geometry, Padding


def forward(x: Image, side: int, geometry: Geometry) -> Output:
    """Returns the maximum of each window; the arguments are those of `max_pool`."""
    sums = accumulation_dtype(x.dtype)
    wide = (values.astype(sums) for values in _values_by_tap(x, side, geometry))
    return functools.reduce(jnp.maximum, wide).astype(x.dtype)


def backward(x: Image, g: Output, side: int, geometry: Geometry) -> Image:
    """Returns the gradient of `forward`; the first of equal maxima receives it all."""
    maximum, *later = _values_by_tap(x, side, geometry)
    winner = jnp.zeros(maximum.shape, jnp.int32)
    for tap, values in enumerate(later, 1):
        winner = jnp.where(values > maximum, tap, winner)
        maximum = jnp.maximum(values, maximum)
    return _to_winners(winner, g, x.shape, side, geometry)


def _values_by_tap(x: Image, side: int, geometry: Geometry) -> list[Output]:
    """Returns the pixels under each of the side*side taps; the padding is -inf.

    The taps are in the order of rows.
    """
    x = pad(x, geometry.padding, -jnp.inf)
    return taps(x, side, dataclasses.replace(geometry, padding=((0, 0), (0, 0))))


def _to_winners(
    winner: Int[Array, "b h2 w2 c"],
    g: Output,
    shape: tuple[int, ...],
    side: int,
    geometry: Geometry,
) -> Image:
    """Adds each value of `g` to the pixel that its window's winning tap saw.

    Args:
      winner: The number of the tap that saw the first maximum of each window.
      g: The gradient with respect to the output.
      shape: The shape of the images.
      side: The side of the window.
      geometry: Stride and padding.
    """
    s = geometry.stride
    _, height, width, _ = shape
    (top, bottom), (left, right) = geometry.padding
    # The pixels whose row and column have equal remainders by the stride make up a
    # plane, which is seen by few taps.
    rows, columns = -(-(height + top + bottom) // s), -(-(width + left + right) // s)
    reach = (side - 1) // s
    padding: Padding = (
        (reach, rows - g.shape[1]),
        (reach, columns - g.shape[2]),
    )
    no_tap = side * side
    winner = pad(winner.astype(np.min_scalar_type(no_tap)), padding, no_tap)
    # Without the barrier, XLA finds the winners again for each tap.
    winner, g = fusion_barrier(winner), fusion_barrier(pad(g, padding))
    sums = accumulation_dtype(g.dtype)
    planes = [jnp.zeros((len(g), rows, columns, g.shape[3]), sums)] * s**2
    for tap in range(side * side):
        (down, row), (along, column) = (divmod(at, s) for at in divmod(tap, side))
        corner = (reach - down, reach - along)
        won = _crop(winner, corner, rows, columns) == tap
        gradient = jnp.where(won, _crop(g, corner, rows, columns), 0)
        planes[row * s + column] += gradient
    x = _interleave(*(fusion_barrier(plane.astype(g.dtype)) for plane in planes))
    return _crop(x, (top, left), height, width)


@moves_values
def _crop(x: Values, corner: tuple[int, int], height: int, width: int) -> MovedValues:
    """Returns the pixels of a rectangle, given its top left corner and its size."""
    top, left = corner
    return x[:, top : top + height, left : left + width]


@moves_values
def _interleave(*planes: Values) -> MovedValues:
    """Makes one image of planes that hold every stride-th pixel, row by row."""
    s = math.isqrt(len(planes))
    rows = [jnp.stack(planes[i : i + s], axis=3) for i in range(0, len(planes), s)]
    x = jnp.stack(rows, axis=2)
    b, h, _, w, _, c = x.shape
    return x.reshape(b, h * s, w * s, c)
