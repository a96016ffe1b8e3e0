"""Max pooling: the dispatch to a platform's implementation."""

import functools

import jax

from resnet_jax.kernels import plain
from resnet_jax.kernels.arrays import Image, Output
from resnet_jax.kernels.cpu import pool as cpu_pool
from resnet_jax.kernels.geometry import Geometry
from resnet_jax.kernels.platforms import by_platform, is_plain


def max_pool(x: Image, side: int, geometry: Geometry) -> Output:
    """Returns the maximum of each window of side x side; the padding is -inf.

    The gradient goes to the first of equal maxima in a window, row by row, like XLA's
    `select_and_scatter` and torch's `max_pool2d`.

    Args:
      x: The images.
      side: The side of the window in pixels.
      geometry: Stride and padding; a dilation is ignored.
    """
    if is_plain():
        return plain.max_pool(x, side, geometry)
    return _max_pool(x, side, geometry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: Image, side: int, geometry: Geometry) -> Output:
    return _forward(x, side, geometry)[0]


def _forward(x: Image, side: int, geometry: Geometry) -> tuple[Output, Image]:
    cpu, default = (
        functools.partial(f, side=side, geometry=geometry)
        for f in (cpu_pool.forward, plain.max_pool)
    )
    return by_platform(x, cpu=cpu, default=default), x


def _backward(side: int, geometry: Geometry, x: Image, g: Output) -> tuple[Image]:
    cpu, default = (
        functools.partial(f, side=side, geometry=geometry)
        for f in (cpu_pool.backward, _backward_by_xla)
    )
    return (by_platform(x, g, cpu=cpu, default=default),)


_max_pool.defvjp(_forward, _backward)


def _backward_by_xla(x: Image, g: Output, side: int, geometry: Geometry) -> Image:
    pool = functools.partial(plain.max_pool, side=side, geometry=geometry)
    _, pull = jax.vjp(pool, x)
    return pull(g)[0]
