"""Max pooling on CPUs, where XLA's windows and their gradient are slow."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from resnet_jax.kernels.cpu.conv import (
    Geometry,
    OtherValues,
    Values,
    moving,
    of_sums,
    pad,
    taps,
    unfused,
)
from resnet_jax.kernels.platforms import by_platform

Image = Float[Array, "b h w c"]
Output = Float[Array, "b h2 w2 c"]


def max_pool(x: Image, side: int, where: Geometry) -> Output:
    """The greatest value of each window of side x side; padding counts as -inf.

    The gradient goes to the first of equal values, row by row, as in
    XLA's `select_and_scatter` and in torch.
    """
    return _max_pool(x, side, where)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: Image, side: int, where: Geometry) -> Output:
    return _forward(x, side, where)[0]


def _forward(x: Image, side: int, where: Geometry):
    cpu, xla = (functools.partial(f, side=side, where=where) for f in (_greatest, _xla))
    return by_platform(x, cpu=cpu, default=xla), x


def _backward(side: int, where: Geometry, x: Image, g: Output):
    cpu, xla = (
        functools.partial(f, side=side, where=where)
        for f in (_to_first, _select_and_scatter)
    )
    return (by_platform(x, g, cpu=cpu, default=xla),)


_max_pool.defvjp(_forward, _backward)


def _xla(x: Image, side: int, where: Geometry) -> Output:
    strides = (where.stride, where.stride)
    return nn.max_pool(x, (side, side), strides, where.padding)


def _select_and_scatter(x: Image, g: Output, side: int, where: Geometry) -> Image:
    _, pull = jax.vjp(functools.partial(_xla, side=side, where=where), x)
    return pull(g)[0]


def _greatest(x: Image, side: int, where: Geometry) -> Output:
    wide = (one.astype(of_sums(x.dtype)) for one in _seen(x, side, where))
    return functools.reduce(jnp.maximum, wide).astype(x.dtype)


def _seen(x: Image, side: int, where: Geometry) -> list[Output]:
    """What each of side*side taps sees, row by row; -inf in the padding."""
    x = pad(x, where.padding, -jnp.inf)
    return taps(x, side, dataclasses.replace(where, padding=((0, 0), (0, 0))))


def _to_first(x: Image, g: Output, side: int, where: Geometry) -> Image:
    greatest, *others = _seen(x, side, where)
    winner = jnp.zeros(greatest.shape, jnp.int32)
    for tap, one in enumerate(others, 1):
        winner = jnp.where(one > greatest, tap, winner)
        greatest = jnp.maximum(one, greatest)
    return _add_up(winner, g, x.shape, side, where)


def _add_up(
    winner: Int[Array, "b h2 w2 c"], g: Output, shape: tuple, side: int, where: Geometry
) -> Image:
    """Gives each value of `g` to the pixel that its window's winning tap saw."""
    s, d, sizes = where.stride, where.dilation, shape[1:3]
    # Pixels of one remainder by the stride are a plane, which few taps see.
    plane = [
        -(-(size + sum(around)) // s)
        for size, around in zip(sizes, where.padding, strict=True)
    ]
    reach = d * (side - 1) // s
    padding = tuple(
        (reach, size - outputs)
        for size, outputs in zip(plane, g.shape[1:3], strict=True)
    )
    none = side * side
    winner = pad(winner.astype(np.min_scalar_type(none)), padding, none)
    # Else XLA finds the winners anew for each tap.
    winner, g = unfused(winner), unfused(pad(g, padding))
    planes = [jnp.zeros((len(g), *plane, g.shape[3]), of_sums(g.dtype))] * s**2
    for tap in range(side * side):
        (down, row), (right, column) = (divmod(d * at, s) for at in divmod(tap, side))
        first = (reach - down, reach - right)
        its = jnp.where(_cut(winner, first, plane) == tap, _cut(g, first, plane), 0)
        planes[row * s + column] += its
    x = _interleave(*(unfused(plane.astype(g.dtype)) for plane in planes))
    (top, _), (left, _) = where.padding
    return _cut(x, (top, left), sizes)


@moving
def _cut(x: Values, first: Sequence[int], sizes: Sequence[int]) -> OtherValues:
    """The pixels from one on."""
    (top, left), (height, width) = first, sizes
    return x[:, top : top + height, left : left + width]


@moving
def _interleave(*planes: Values) -> OtherValues:
    """One image of planes of every stride-th pixel, row by row."""
    s = math.isqrt(len(planes))
    rows = [jnp.stack(planes[i : i + s], axis=3) for i in range(0, len(planes), s)]
    x = jnp.stack(rows, axis=2)
    b, h, _, w, _, c = x.shape
    return x.reshape(b, h * s, w * s, c)
