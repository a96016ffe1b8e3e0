"""Batch norm on CPUs, where it is limited by memory bandwidth.

By itself, XLA writes float32 copies of the input and of its gradient, and the passes
over the data read those. Here each pass reads the original arrays: barriers make the
inputs and the mean of each pass different arrays to XLA, so that neither the conversion
to float32 nor the deviations from the mean are shared between passes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from resnet_jax.kernels.arrays import Image
from resnet_jax.kernels.norm_options import GhostBatchNorm
from resnet_jax.kernels.platforms import traced_once

Vector = Float[Array, "c"]
Statistics = Float[Array, "g c"]
Batches = Float[Array, "g n h w c"]


def forward(
    x: Image, scale: Vector, bias: Vector, near: Vector, norm: GhostBatchNorm
) -> tuple[Image, Statistics, Statistics]:
    """Normalises and activates, like `kernels.norm.forward`; it does not use `near`."""
    mean = _mean(_ghost_batches(x, norm.size))
    x, mean = lax.optimization_barrier((x, mean))
    var = _mean(jnp.square(_ghost_batches(x, norm.size) - _wide(mean)))
    x, mean, var = lax.optimization_barrier((x, mean, var))
    factor = scale / jnp.sqrt(var + norm.epsilon)
    out = (_ghost_batches(x, norm.size) - _wide(mean)) * _wide(factor) + bias
    out = norm.activation(out) if norm.activation else out
    return out.reshape(x.shape).astype(norm.dtype), mean, var


def backward(
    x: Image,
    g: Image,
    scale: Vector,
    bias: Vector,
    mean: Statistics,
    var: Statistics,
    norm: GhostBatchNorm,
) -> tuple[Image, Vector, Vector]:
    """Returns the gradients by `x`, scale and bias, like `kernels.norm.backward`."""
    inverse = 1 / jnp.sqrt(var + norm.epsilon)

    deviation_and_gradient = functools.partial(
        _deviation_and_gradient, factor=scale * inverse, bias=bias, norm=norm
    )
    x, g, mean = lax.optimization_barrier((x, g, mean))
    _, gradient = deviation_and_gradient(x, g, mean)
    total = gradient.sum(axis=(1, 2, 3))
    x, g, mean, total = lax.optimization_barrier((x, g, mean, total))
    deviation, gradient = deviation_and_gradient(x, g, mean)
    along = (gradient * deviation).sum(axis=(1, 2, 3)) * inverse
    x, g, mean, along = lax.optimization_barrier((x, g, mean, along))
    deviation, gradient = deviation_and_gradient(x, g, mean)
    n = norm.pixels(x)
    # The gradient without its mean and without its component along the deviations.
    projected = gradient - _wide(total / n) - deviation * _wide(along * inverse / n)
    dx = (projected * _wide(scale * inverse)).reshape(x.shape).astype(x.dtype)
    return dx, along.sum(axis=0), total.sum(axis=0)


@functools.partial(traced_once, static_argnames="norm")
def _deviation_and_gradient(
    x: Image,
    g: Image,
    mean: Statistics,
    factor: Statistics,
    bias: Vector,
    norm: GhostBatchNorm,
) -> tuple[Batches, Batches]:
    """Returns the deviations from the mean, and the gradient before the activation."""
    deviation = _ghost_batches(x, norm.size) - _wide(mean)
    gradient = _ghost_batches(g, norm.size)
    if norm.activation:
        out = deviation * _wide(factor) + bias
        (gradient,) = jax.vjp(norm.activation, out)[1](gradient)
    return deviation, gradient


def _ghost_batches(x: Image, size: int) -> Batches:
    b, h, w, c = x.shape
    return x.reshape(b // size, size, h, w, c).astype(jnp.float32)


def _mean(batches: Batches) -> Statistics:
    return batches.mean(axis=(1, 2, 3))


def _wide(statistics: Statistics) -> Float[Array, "g 1 1 1 c"]:
    return statistics[:, None, None, None]
