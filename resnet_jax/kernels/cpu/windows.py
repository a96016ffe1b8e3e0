"""Windows of images on CPUs: padding, and the pixels that each tap sees."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped

from resnet_jax.kernels.geometry import Geometry, Padding

# Functions that only move values take values of any dtype.
Values = Shaped[Array, "b h w c"]
MovedValues = Shaped[Array, "b _ _ _"]

# Before jax 0.12 XLA computes with bfloat16 on CPUs in float32, even where it only
# moves values. Products with a bfloat16 result are fast only if the CPU has AMX.
BFLOAT16_IS_SLOW = jax.__version_info__ < (0, 12)


def moves_values(move: Callable) -> Callable:
    """Decorates a function that only moves values, so that it moves bfloat16 as bits.

    Its derivatives are computed in float32: the transpose of reading a pixel for
    several outputs adds the gradients of all of them.

    Args:
      move: A function of arrays, followed by other arguments. It may not compute with
        the arrays' values.
    """

    @functools.wraps(move)
    def moved(*args):
        arrays = [arg for arg in args if isinstance(arg, jax.Array)]
        arguments = args[len(arrays) :]
        if any(array.dtype != jnp.bfloat16 for array in arrays):
            return move(*args)

        @jax.custom_jvp
        def move_bfloat16(*arrays):
            if not BFLOAT16_IS_SLOW:
                return move(*arrays, *arguments)
            bits = [lax.bitcast_convert_type(array, jnp.uint16) for array in arrays]
            back = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.bfloat16)
            return jax.tree.map(back, move(*bits, *arguments))

        @move_bfloat16.defjvp
        def _(primals, tangents):
            wide = move(
                *(tangent.astype(jnp.float32) for tangent in tangents), *arguments
            )
            narrow = jax.tree.map(lambda tangent: tangent.astype(jnp.bfloat16), wide)
            return move_bfloat16(*primals), narrow

        return move_bfloat16(*arrays)

    return moved


@moves_values
def taps(x: Values, k: int, geometry: Geometry) -> list[MovedValues]:
    """Returns the pixels that each of the k*k taps of a window sees, row by row."""
    s, d = geometry.stride, geometry.dilation
    h, w = (geometry.output_length(x.shape[1 + axis], axis, k) for axis in range(2))
    x = pad(x, geometry.padding)
    b, _, _, c = x.shape
    return [
        lax.slice(
            x,
            (0, i * d, j * d, 0),
            (b, i * d + (h - 1) * s + 1, j * d + (w - 1) * s + 1, c),
            (1, s, s, 1),
        )
        for i in range(k)
        for j in range(k)
    ]


def pad(x: Values, padding: Padding, fill: float | int = 0) -> MovedValues:
    """Pads height and width with pixels of one value; negative numbers crop."""
    config = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    return moves_values(lax.pad)(x, jnp.array(fill, x.dtype), config)


@jax.custom_jvp
def fusion_barrier(x: Array) -> Array:
    """Keeps XLA from fusing `x` into the transposition of a product's operand.

    Such a fusion reads across cache lines, which is many times as slow.
    """
    if jax.__version_info__ >= (0, 12):
        return lax.optimization_barrier(x)
    # Before jax 0.12, XLA removes barriers ahead of its fusions, but it keeps a loop
    # whose number of iterations it finds only later.
    once = lax.optimization_barrier(jnp.int32(1))
    return lax.fori_loop(0, once, lambda _, x: lax.optimization_barrier(x), x)


@fusion_barrier.defjvp
def _fusion_barrier_tangent(primals, tangents):
    return fusion_barrier(*primals), *tangents
