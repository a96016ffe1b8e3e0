"""Convolutions of all kinds, and what tests compute of them."""

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.kernels.cpu.lowerings import lower
from resnet_jax.kernels.geometry import Geometry, Padding
from tests.helpers import keyed


def same(pad: int) -> Padding:
    """Returns so many pixels of padding on all sides."""
    return ((pad, pad), (pad, pad))


# Side of the kernel, geometry, height, width, channels, features: the layers of the zoo
# at even and odd sizes, 'SAME' at an even size, and windows that leave pixels out.
KINDS = [
    (1, Geometry(), 5, 6, 4, 6),
    (1, Geometry(), 5, 6, 6, 3),
    (1, Geometry(2), 5, 6, 6, 8),
    (1, Geometry(2), 6, 5, 3, 2),
    (3, Geometry(1, same(1)), 5, 6, 8, 6),
    (3, Geometry(1, same(0)), 6, 5, 8, 8),
    (3, Geometry(2, same(1)), 7, 6, 8, 4),
    (3, Geometry(2, ((0, 1), (0, 1))), 6, 8, 4, 8),
    (3, Geometry(2, ((0, 1), (1, 1))), 6, 7, 8, 8),
    (3, Geometry(1, same(2), 2), 9, 8, 8, 4),
    (3, Geometry(2, same(2), 2), 9, 8, 4, 8),
    (5, Geometry(3, same(2)), 13, 11, 8, 8),
    (7, Geometry(2, same(3)), 16, 13, 3, 8),
    (3, Geometry(1, same(1)), 4, 5, 3, 8),
]


def draw(dtype, *shape: int) -> jax.Array:
    """Draws standard normal values."""
    values = keyed.generator(str(shape)).standard_normal(shape, np.float32)
    return jnp.asarray(values, dtype)


def draw_problem(
    k: int, geometry: Geometry, h: int, w: int, c: int, f: int, dtype
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws eight images, a kernel, and a gradient with respect to the output."""
    x, kernel = draw(dtype, 8, h, w, c), draw(dtype, k, k, c, f)
    h2, w2 = geometry.output_length(h, 0, k), geometry.output_length(w, 1, k)
    return x, kernel, draw(dtype, 8, h2, w2, f)


def compute(
    direction: str,
    lowering: str,
    x: jax.Array,
    kernel: jax.Array,
    g: jax.Array,
    geometry: Geometry,
) -> jax.Array:
    """Computes a direction of a convolution by a lowering."""
    args = {"forward": (x, kernel), "input": (g, kernel), "kernel": (x, g)}[direction]
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return lower(direction, lowering, *args, like, len(kernel), geometry)
