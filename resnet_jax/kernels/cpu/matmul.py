"""Matrix products of images on CPUs, by oneDNN where that is faster than XLA.

XLA's bfloat16 product on CPUs is fast for a row-major left operand times a row-major
right operand. Other layouts are computed in float32, eight times as slowly. An operand
that is contracted over more than one axis gets the fast layout.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.kernels import onednn
from resnet_jax.kernels.arrays import Image, Output, accumulation_dtype, shape_like
from resnet_jax.kernels.cpu.windows import BFLOAT16_IS_SLOW, fusion_barrier

Matrix = Float[Array, "c f"]


def dot(x: Image, kernel: Matrix, dtype: DTypeLike | None = None) -> Output:
    """Returns the product of each pixel with a matrix, by default of the dtype of x."""
    # The pixels are made one axis: the derivative with respect to the kernel would
    # otherwise contract several axes, whose sums jax 0.12 computes in bfloat16.
    out = _multiply(x.reshape(-1, x.shape[-1]), kernel, ((1,), (0,)), dtype)
    return out.reshape(*x.shape[:-1], -1)


def dot_transposed(g: Output, kernel: Matrix) -> Image:
    """Returns the product of each pixel with the transpose of a matrix."""
    *pixels, f = g.shape
    if _uses_onednn(g.dtype, math.prod(pixels)):
        out = _multiply(g.reshape(-1, f), kernel, ((1,), (1,)))
        return out.reshape(*pixels, -1)
    part = math.gcd(f, 2)
    g = g.reshape(*pixels, part, f // part)
    kernel = kernel.reshape(-1, part, f // part)
    return _multiply(g, kernel, ((3, 4), (1, 2)))


def outer_product(x: Image, g: Output) -> Matrix:
    """Returns the sum of x[c] g[f] over all pixels."""
    c, f = x.shape[-1], g.shape[-1]
    if _uses_onednn(x.dtype, math.prod(x.shape[:-1])):
        return _multiply(x.reshape(-1, c), g.reshape(-1, f), ((0,), (0,)))
    if x.dtype != jnp.bfloat16:
        x, g = x.reshape(-1, c), g.reshape(-1, f)
        # The narrower operand is transposed, and the barrier keeps XLA from swapping
        # the operands back.
        return x.T @ g if c <= f else lax.optimization_barrier(g.T @ x).T
    pixels = ((0, 1, 2), (0, 1, 2))
    if c <= f:
        return _multiply(fusion_barrier(x), g, pixels)
    # The barrier keeps XLA from swapping the operands back.
    return lax.optimization_barrier(_multiply(fusion_barrier(g), x, pixels)).T


def with_derivatives_of(plain: Callable, call: Callable) -> Callable:
    """Gives `call` the derivatives of `plain`, which computes the same of two arrays.

    Calls of oneDNN have no derivatives of their own.
    """
    call = jax.custom_jvp(call)
    call.defjvp(
        lambda primals, tangents: (call(*primals), jax.jvp(plain, primals, tangents)[1])
    )
    return call


def _multiply(
    left: Array,
    right: Array,
    contracted: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: DTypeLike | None = None,
) -> Array:
    """Returns a product of a dtype, by default that of its operands."""
    dtype = dtype or left.dtype
    sums = accumulation_dtype(dtype) if BFLOAT16_IS_SLOW else dtype
    axes = (contracted, ((), ()))

    def by_xla(left, right):
        out = lax.dot_general(left, right, axes, preferred_element_type=sums)
        return out.astype(dtype)

    if not _uses_onednn(left.dtype, left.shape[0]):
        return by_xla(left, right)
    (left_axis,), (right_axis,) = contracted
    shape = left.shape[1 - left_axis], right.shape[1 - right_axis]
    result = shape_like(left, shape).update(dtype=dtype)

    def by_onednn(left, right):
        return onednn.multiply(left, right, (left_axis, right_axis), result)

    return with_derivatives_of(by_xla, by_onednn)(left, right)


def _uses_onednn(dtype: DTypeLike, pixels: int) -> bool:
    """Returns whether oneDNN computes products of a dtype.

    It does not where XLA's products of bfloat16 are faster.
    """
    if dtype == jnp.bfloat16 and not BFLOAT16_IS_SLOW:
        return pixels >= onednn.MANY_PIXELS and onednn.widens()
    return onednn.computes(dtype)
