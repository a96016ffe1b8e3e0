"""Max pooling on CPUs, where XLA's windows and their gradient are slow."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from resnet_jax.models.cpu_forms import Geometry, of_sums, taps

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
    return lax.platform_dependent(x, cpu=cpu, default=xla), x


def _backward(side: int, where: Geometry, x: Image, g: Output):
    cpu, xla = (
        functools.partial(f, side=side, where=where)
        for f in (_to_first, _select_and_scatter)
    )
    return (lax.platform_dependent(x, g, cpu=cpu, default=xla),)


_max_pool.defvjp(_forward, _backward)


def _xla(x: Image, side: int, where: Geometry) -> Output:
    strides = (where.stride, where.stride)
    return nn.max_pool(x, (side, side), strides, where.padding)


def _select_and_scatter(x: Image, g: Output, side: int, where: Geometry) -> Image:
    _, pull = jax.vjp(functools.partial(_xla, side=side, where=where), x)
    return pull(g)[0]


def _greatest(x: Image, side: int, where: Geometry) -> Output:
    return functools.reduce(jnp.maximum, taps(x, side, where, fill=-jnp.inf))


def _to_first(x: Image, g: Output, side: int, where: Geometry) -> Image:
    greatest, *others = taps(x, side, where, fill=-jnp.inf)
    winner = jnp.zeros(greatest.shape, jnp.int32)
    for tap, one in enumerate(others, 1):
        winner = jnp.where(one > greatest, tap, winner)
        greatest = jnp.maximum(one, greatest)
    # Else XLA finds the winners anew for each tap.
    winner = lax.optimization_barrier(winner.astype(jnp.uint8))
    parts = [jnp.where(winner == tap, g, 0) for tap in range(side * side)]
    return _add_up(parts, x.shape, side, where)


def _add_up(parts: list[Output], shape: tuple, side: int, where: Geometry) -> Image:
    """The transpose of `taps`: adds what each tap gives to the pixel that it saw."""
    s, (b, *sizes, c) = where.stride, shape
    # Pixels of one remainder by the stride are a plane, which few taps see.
    blocks = [
        -(-(size + sum(pad)) // s)
        for size, pad in zip(sizes, where.padding, strict=True)
    ]
    summed = of_sums(parts[0].dtype)
    planes = [[jnp.zeros((b, *blocks, c), summed)] * s for _ in range(s)]
    for tap, part in enumerate(parts):
        offsets = [where.dilation * t for t in divmod(tap, side)]
        config = [
            (offset // s, block - size - offset // s, 0)
            for offset, block, size in zip(
                offsets, blocks, part.shape[1:3], strict=True
            )
        ]
        row, column = (offset % s for offset in offsets)
        zero = jnp.zeros((), part.dtype)
        moved = lax.pad(part, zero, [(0, 0, 0), *config, (0, 0, 0)])
        planes[row][column] += moved.astype(summed)
    dtype = parts[0].dtype
    rows = [jnp.stack([p.astype(dtype) for p in row], axis=3) for row in planes]
    x = jnp.stack(rows, axis=2).reshape(b, blocks[0] * s, blocks[1] * s, c)
    (top, _), (left, _) = where.padding
    return x[:, top : top + sizes[0], left : left + sizes[1]]
