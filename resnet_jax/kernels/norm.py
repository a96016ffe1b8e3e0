"""Batch norm over ghost batches in training: the dispatch to an implementation.

The activation, and max pooling, that follow the norm are part of it. CPUs have an
implementation of their own (`kernels/cpu/norm.py`), and on TPUs the norm can be fused
with the 1x1 convolution before it (`kernels/tpu/norm.py`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from resnet_jax.kernels import plain
from resnet_jax.kernels.arrays import Image, Output
from resnet_jax.kernels.conv import FusibleConvolution
from resnet_jax.kernels.cpu import norm as cpu_norm
from resnet_jax.kernels.norm_options import GhostBatchNorm, repeat_for_examples
from resnet_jax.kernels.platforms import (
    by_platform,
    fused_over,
    is_plain,
    traced_once,
)
from resnet_jax.kernels.tpu import norm as tpu_norm
from resnet_jax.parallel.sharding import match_varying_axes

__all__ = ["GhostBatchNorm", "batch_norm", "update_running"]

Vector = Float[Array, "c"]
Statistics = Float[Array, "g c"]


def batch_norm(
    x: Image | FusibleConvolution,
    scale: Vector,
    bias: Vector,
    running_mean: Vector,
    norm: GhostBatchNorm,
    *,
    pool: Callable | None = None,
) -> tuple[Output, Statistics, Statistics]:
    """Normalises each ghost batch by its own statistics, then activates and pools.

    Args:
      x: The batch, or the convolution whose output is normalised, which is fused with
        its norm inside of `platforms.fused_over`. The size of the ghost batches must
        divide the number of examples.
      scale: The factor of each channel.
      bias: The summand of each channel.
      running_mean: An estimate of the means. The variance is computed from distances to
        it, which keeps it accurate where the means are large.
      norm: The ghost batches' size, epsilon, activation and output dtype.
      pool: A max pooling of the output, or None. With it, the activation must not
        decrease anywhere.

    Returns:
      The output, and the means and variances of the ghost batches in float32.
    """
    if isinstance(x, FusibleConvolution):
        mesh = None if is_plain() else fused_over.value
        if mesh is not None and tpu_norm.is_supported(x, norm.size, mesh):
            out, mean, var = tpu_norm.normalize(x, scale, bias, norm, mesh)
            return norm.activate(out), mean, var
        x = x.evaluate()
    if is_plain():
        return plain.batch_norm(x, scale, bias, norm, pool)
    near = lax.stop_gradient(running_mean)
    arrays = match_varying_axes(x, scale, bias, near)
    if pool:
        return _normalize_and_pool(*arrays, norm=norm, pool=pool)
    return _normalize(*arrays, norm)


@functools.partial(traced_once, static_argnames=("decay_rate", "factor"))
def update_running(
    running: Vector, batches: Statistics, factor: float = 1.0, *, decay_rate: float
) -> Vector:
    """Returns the running mean of a statistic after one more training step.

    Args:
      running: The running mean before the step.
      batches: The statistic of each ghost batch of the step.
      factor: A factor of the new statistic.
      decay_rate: The weight of the running mean; the ghost batches' mean has the rest.
    """
    return decay_rate * running + (1 - decay_rate) * (factor * batches.mean(axis=0))


# One custom gradient for all platforms, since JAX differentiates a choice of platforms
# slowly.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalize(
    x: Image, scale: Vector, bias: Vector, near: Vector, norm: GhostBatchNorm
) -> tuple[Output, Statistics, Statistics]:
    return _forward_on_platform(x, scale, bias, near, norm=norm)


def _normalize_forward(x, scale, bias, near, norm):
    out, mean, var = _forward_on_platform(x, scale, bias, near, norm=norm)
    return (out, mean, var), (x, scale, bias, mean, var)


def _normalize_backward(norm, saved, cotangents):
    x, scale, bias, mean, var = saved
    g, _, _ = cotangents
    gradients = _backward_on_platform(x, g, scale, bias, mean, var, norm=norm)
    return *gradients, jnp.zeros_like(scale)


_normalize.defvjp(_normalize_forward, _normalize_backward)


@functools.partial(traced_once, static_argnames="norm")
def _forward_on_platform(*arrays, norm):
    return _on_platform(cpu_norm.forward, forward, arrays, norm)


@functools.partial(traced_once, static_argnames="norm")
def _backward_on_platform(*arrays, norm):
    return _on_platform(cpu_norm.backward, backward, arrays, norm)


def _on_platform(cpu: Callable, default: Callable, arrays, norm: GhostBatchNorm):
    cpu, default = (functools.partial(f, norm=norm) for f in (cpu, default))
    return by_platform(*arrays, cpu=cpu, default=default)


@functools.partial(traced_once, static_argnames=("norm", "pool"))
def _normalize_and_pool(*arrays, norm, pool):
    def on_cpu(*arrays):
        out, mean, var = _normalize(*arrays, norm)
        return pool(out), mean, var

    default = functools.partial(forward, norm=norm, pool=pool)
    return by_platform(*arrays, cpu=on_cpu, default=default)


def forward(
    x: Image,
    scale: Vector,
    bias: Vector,
    near: Vector,
    norm: GhostBatchNorm,
    pool: Callable | None = None,
) -> tuple[Output, Statistics, Statistics]:
    """Normalises, activates and pools, on all platforms but CPUs.

    Both sums are computed in one pass, which compilers for accelerators fuse into the
    convolution before the norm. They are first taken over each example's pixels, so
    that no axis of `x` has to be divided into ghost batches.

    Args:
      x: The batch.
      scale: The factor of each channel.
      bias: The summand of each channel.
      near: An estimate of the means. The variance is computed from squared distances to
        it; float32 would round it away in squares of large values.
      norm: The norm's parameters.
      pool: A max pooling of the output, or None. It is applied to `x`, so that only a
        quarter of the pixels is left to normalise, and the output is never full-size.

    Returns:
      The output, and the means and variances of the ghost batches in float32.
    """
    if pool:
        # The maximum of the outputs is the output of the maximum input, or, with a
        # negative scale, of the minimum.
        sign = jnp.where(scale < 0, -1.0, 1.0)
        x, near, scale = x * sign.astype(x.dtype), near * sign, scale * sign
    wide = x.astype(jnp.float32)
    distance = wide - near
    offset = _mean_over_pixels(distance, norm)
    square = _mean_over_pixels(jnp.square(distance), norm)
    mean, var = near + offset, jnp.maximum(square - jnp.square(offset), 0)
    factor = scale / jnp.sqrt(var + norm.epsilon)
    if pool:
        wide = pool(x).astype(jnp.float32)
    repeat = functools.partial(repeat_for_examples, size=norm.size)
    out = norm.activate((wide - repeat(mean)) * repeat(factor) + bias)
    return out, mean * sign if pool else mean, var


def backward(
    x: Image,
    g: Image,
    scale: Vector,
    bias: Vector,
    mean: Statistics,
    var: Statistics,
    norm: GhostBatchNorm,
) -> tuple[Image, Vector, Vector]:
    """Returns the gradients of `forward`, without pooling, by `x`, scale and bias.

    Args:
      x: The batch.
      g: The gradient with respect to the output.
      scale: The factor of each channel.
      bias: The summand of each channel.
      mean: The means that `forward` returned.
      var: The variances that `forward` returned.
      norm: The norm's parameters.
    """
    inverse = 1 / jnp.sqrt(var + norm.epsilon)
    repeat = functools.partial(repeat_for_examples, size=norm.size)
    factor = repeat(scale * inverse)
    deviation = x.astype(jnp.float32) - repeat(mean)
    g = g.astype(jnp.float32)
    if norm.activation:
        (g,) = jax.vjp(norm.activation, deviation * factor + bias)[1](g)
    total = _mean_over_pixels(g, norm)
    along = _mean_over_pixels(g * deviation, norm) * inverse
    # The gradient without its mean and without its component along the deviations.
    projected = g - repeat(total) - deviation * repeat(along * inverse)
    n = norm.pixels(x)
    dx = (projected * factor).astype(x.dtype)
    return dx, n * along.sum(axis=0), n * total.sum(axis=0)


def _mean_over_pixels(x: Image, norm: GhostBatchNorm) -> Statistics:
    """Returns each ghost batch's mean over its examples and pixels."""
    examples = x.sum(axis=(1, 2)).reshape(-1, norm.size, x.shape[3])
    return examples.sum(axis=1) / norm.pixels(x)
