"""Batch norm on CPUs, where memory is what limits it.

Left alone, XLA writes a float32 copy of the input and of its gradient, from which the
passes over them then read. Here each pass reads the arrays as they are: a barrier makes
what it reads, and the mean with it, other arrays in XLA's eyes, so that neither the
conversion nor the deviations from the mean are shared.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from resnet_jax.kernels.platforms import traced_once

Image = Float[Array, "b h w c"]
Vector = Float[Array, "c"]
Groups = Float[Array, "g c"]


def forward(
    x: Image, scale: Vector, bias: Vector, near: Vector, of
) -> tuple[Image, Groups, Groups]:
    """`norms.forward`; `near` is of no use to it."""
    mean = _mean(_groups(x, of.size))
    again, mean = lax.optimization_barrier((x, mean))
    var = _mean(jnp.square(_groups(again, of.size) - _wide(mean)))
    again, mean, var = lax.optimization_barrier((again, mean, var))
    factor = scale / jnp.sqrt(var + of.epsilon)
    out = (_groups(again, of.size) - _wide(mean)) * _wide(factor) + bias
    out = of.activation(out) if of.activation else out
    return out.reshape(x.shape).astype(of.dtype), mean, var


def backward(
    x: Image, g: Image, scale: Vector, bias: Vector, mean: Groups, var: Groups, of
) -> tuple[Image, Vector, Vector]:
    """`norms.backward`."""
    inverse = 1 / jnp.sqrt(var + of.epsilon)

    read = functools.partial(_read, factor=scale * inverse, bias=bias, of=of)
    x, g, mean = lax.optimization_barrier((x, g, mean))
    _, of_output = read(x, g, mean)
    total = of_output.sum(axis=(1, 2, 3))
    x, g, mean, total = lax.optimization_barrier((x, g, mean, total))
    deviation, of_output = read(x, g, mean)
    along = (of_output * deviation).sum(axis=(1, 2, 3)) * inverse
    x, g, mean, along = lax.optimization_barrier((x, g, mean, along))
    deviation, of_output = read(x, g, mean)
    n = of.pixels(x)
    # What is left of the gradient without its mean and its part along the deviations.
    rest = of_output - _wide(total / n) - deviation * _wide(along * inverse / n)
    dx = (rest * _wide(scale * inverse)).reshape(x.shape).astype(x.dtype)
    return dx, along.sum(axis=0), total.sum(axis=0)


@functools.partial(traced_once, static_argnames="of")
def _read(
    x: Image, g: Image, mean: Groups, factor: Groups, bias: Vector, of
) -> tuple[Float[Array, "g n h w c"], Float[Array, "g n h w c"]]:
    """Deviations from the mean, and the gradient before the activation."""
    deviation = _groups(x, of.size) - _wide(mean)
    g = _groups(g, of.size)
    if of.activation:
        out = deviation * _wide(factor) + bias
        (g,) = jax.vjp(of.activation, out)[1](g)
    return deviation, g


def _groups(x: Image, size: int) -> Float[Array, "g n h w c"]:
    b, h, w, c = x.shape
    return x.reshape(b // size, size, h, w, c).astype(jnp.float32)


def _mean(groups: Float[Array, "g n h w c"]) -> Groups:
    return groups.mean(axis=(1, 2, 3))


def _wide(groups: Groups) -> Float[Array, "g 1 1 1 c"]:
    return groups[:, None, None, None]
