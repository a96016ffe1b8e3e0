"""Normalisation, with the activation that follows it.

Batch norm's groups are counted in examples; the other norms look at one example.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.errors import BadValueError
from resnet_jax.kernels.cpu import norm as cpu_norm
from resnet_jax.kernels.platforms import by_platform, traced_once
from resnet_jax.kernels.tpu import norm as tpu_norm
from resnet_jax.kernels.tpu.norm import Product, of_examples
from resnet_jax.models.parameters import parameter
from resnet_jax.parallel.sharding import match_varying_axes


class BatchNorm(nn.Module):
    """Batch norm over groups of `group_size` consecutive examples of the batch.

    Ioffe & Szegedy 2015 (arXiv:1502.03167); groups as in Goyal et al. 2017
    (arXiv:1706.02677), section 2.3, where a group is what one GPU held. A group is
    a number of examples, so the result does not depend on the number of devices; as
    long as no group spans two devices, the statistics need no communication.

    Statistics are float32. The variance is the mean square of distances to the mean,
    or, but on CPUs, to the running mean, less what these differ by: mean squares of
    the values themselves would cancel where the mean is large. The running statistics
    follow the mean over groups.

    Attributes:
      group_size: examples that share statistics; None: the whole batch. The batch
        must be a multiple of it (BadValueError).
      epsilon: added to the variance.
      momentum: keep-momentum of the running statistics.
      unbiased: whether the running variance is multiplied by n / (n - 1).
      scale_init: initialiser of the scale.
      activation: applied to the output, or None.
      pool: max pooling of the output, or None; with it, the activation must not
        decrease anywhere.
      dtype: type of the output.
      unwritten: the devices, where a `Product` that `tpu_norm.suits` is normalised
        without being evaluated; None: it is evaluated.
    """

    group_size: int | None = None
    epsilon: float = 1e-5
    momentum: float = 0.9
    unbiased: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    activation: Callable | None = None
    pool: Callable | None = None
    dtype: DTypeLike = jnp.float32
    unwritten: Mesh | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"] | Product, *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        b, h, w, c = x.shape
        size = self.group_size or b
        if isinstance(x, Product) and not (
            train and self.unwritten and tpu_norm.suits(x, size, self.unwritten)
        ):
            x = x.evaluate()
        scale, bias = _scale_and_bias(self, c, self.scale_init)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,))

        if not train:
            x = _normalize(
                x, running_mean.value, running_var.value, scale, bias, self.epsilon
            )
            x = _activate(x, self.activation, self.dtype)
            return self.pool(x) if self.pool else x

        if b % size:
            raise BadValueError(
                f"A batch of {b} images cannot be cut into ghost batches of {size}; use"
                " a bn_group_size that divides it."
            )
        of = Normalization(size, self.epsilon, self.activation, self.dtype)
        if isinstance(x, Product):
            out, mean, var = tpu_norm.normalize(x, scale, bias, of, self.unwritten)
            out = _activate(out, self.activation, self.dtype)
        else:
            near = lax.stop_gradient(running_mean.value)
            arrays = match_varying_axes(*map(jnp.asarray, (x, scale, bias, near)))
            if self.pool:
                out, mean, var = _normalize_and_pool(*arrays, of=of, pool=self.pool)
            else:
                out, mean, var = _normalize_groups(*arrays, of)

        if not self.is_initializing():
            n = size * h * w
            correction = n / max(n - 1, 1) if self.unbiased else 1.0
            follow = functools.partial(_follow, keep=self.momentum)
            running_mean.value = follow(running_mean.value, mean)
            running_var.value = follow(running_var.value, var, correction)
        return out


class GroupNorm(nn.Module):
    """Wu & He 2018 (arXiv:1803.08494), in float32.

    Attributes:
      groups: number of groups of channels; must divide the channels (BadValueError).
      epsilon, scale_init, activation, dtype: as of `BatchNorm`.
    """

    groups: int = 32
    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    activation: Callable | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w c"]:
        scale, bias = _scale_and_bias(self, x.shape[-1], self.scale_init)
        x = x.astype(jnp.float32)
        grouped = _by_group(x, self.groups)
        axes = (1, 2, 4)
        mean = grouped.mean(axis=axes, keepdims=True)
        var = jnp.square(grouped - mean).mean(axis=axes, keepdims=True)
        normal = (grouped - mean) * lax.rsqrt(var + self.epsilon)
        out = normal.reshape(x.shape) * scale + bias
        return _activate(out, self.activation, self.dtype)


class EvoNormS0(nn.Module):
    """x sigmoid(v x) / std over groups; Liu et al. 2020 (arXiv:2004.02967), S0.

    Without an activation only scale and bias are left, as timm has it.

    Attributes:
      groups, epsilon, scale_init, dtype: as of `GroupNorm`.
      activation: whether (not which) there is one.
    """

    groups: int = 32
    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    activation: Callable | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        scale, bias = _scale_and_bias(self, c, self.scale_init)
        x = x.astype(jnp.float32)
        if self.activation:
            v = parameter(self, "v", nn.initializers.ones, (c,))
            grouped = _by_group(x, self.groups)
            var = grouped.var(axis=(1, 2, 4), keepdims=True)
            gated = (grouped * lax.rsqrt(var + self.epsilon)).reshape(x.shape)
            x = gated * nn.sigmoid(x * v)
        return (x * scale + bias).astype(self.dtype)


class FilterResponseNorm(nn.Module):
    """x / rms over pixels, then max(., tau); Singh & Krishnan 2019 (arXiv:1911.09737).

    Attributes:
      epsilon, scale_init, dtype: as of `BatchNorm`.
      activation: whether (not which) the threshold follows.
    """

    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    activation: Callable | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        scale, bias = _scale_and_bias(self, c, self.scale_init)
        x = x.astype(jnp.float32)
        square = jnp.square(x).mean(axis=(1, 2), keepdims=True)
        x = x * lax.rsqrt(square + self.epsilon) * scale + bias
        if self.activation:
            zeros = nn.initializers.zeros
            x = jnp.maximum(x, parameter(self, "tau", zeros, (c,)))
        return x.astype(self.dtype)


class NoNorm(nn.Module):
    """The activation alone."""

    activation: Callable | None = None
    dtype: DTypeLike = jnp.float32

    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w c"]:
        return _activate(x, self.activation, self.dtype)


def with_activation(
    norm: Callable[..., nn.Module], activation: Callable, *, act: bool = True, **more
) -> nn.Module:
    """Makes a norm, with the activation or (`act=False`) without."""
    return norm(activation=activation if act else None, **more)


@dataclasses.dataclass(frozen=True)
class Normalization:
    """What batch norm does to a group; the attributes are those of `BatchNorm`."""

    size: int
    epsilon: float
    activation: Callable | None
    dtype: DTypeLike

    def pixels(self, x: Float[Array, "b h w c"]) -> float:
        """Those of a group; JAX's integers could not hold as many as there may be."""
        return float(self.size * x.shape[1] * x.shape[2])


# One derivative for all platforms: JAX is slow at finding that of a choice of them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalize_groups(x, scale, bias, near, of):
    return _forward_on_platform(x, scale, bias, near, of=of)


def _save(x, scale, bias, near, of):
    out, mean, var = _forward_on_platform(x, scale, bias, near, of=of)
    return (out, mean, var), (x, scale, bias, mean, var)


def _pull(of, saved, cotangents):
    x, scale, bias, mean, var = saved
    g, _, _ = cotangents
    found = _backward_on_platform(x, g, scale, bias, mean, var, of=of)
    return *found, jnp.zeros_like(scale)


_normalize_groups.defvjp(_save, _pull)


@functools.partial(traced_once, static_argnames="of")
def _forward_on_platform(*arrays, of):
    return _on_platform(cpu_norm.forward, forward, arrays, of)


@functools.partial(traced_once, static_argnames="of")
def _backward_on_platform(*arrays, of):
    return _on_platform(cpu_norm.backward, backward, arrays, of)


def _on_platform(cpu, default, arrays, of):
    cpu, default = (functools.partial(one, of=of) for one in (cpu, default))
    return by_platform(*arrays, cpu=cpu, default=default)


@functools.partial(traced_once, static_argnames=("keep", "factor"))
def _follow(
    running: Float[Array, "c"],
    groups: Float[Array, "g c"],
    factor: float = 1.0,
    *,
    keep: float,
) -> Float[Array, "c"]:
    """The running statistic after one of each group, times `factor`."""
    return keep * running + (1 - keep) * (factor * groups.mean(axis=0))


@functools.partial(traced_once, static_argnames=("of", "pool"))
def _normalize_and_pool(*arrays, of, pool):
    def on_cpu(*arrays):
        out, mean, var = _normalize_groups(*arrays, of)
        return pool(out), mean, var

    default = functools.partial(forward, of=of, pool=pool)
    return by_platform(*arrays, cpu=on_cpu, default=default)


def forward(
    x: Float[Array, "b h w c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    near: Float[Array, "c"],
    of: Normalization,
    pool: Callable | None = None,
) -> tuple[Float[Array, "b h2 w2 c"], Float[Array, "g c"], Float[Array, "g c"]]:
    """Normalises each `of.size` consecutive examples, with activation and pooling.

    Both sums are taken in one pass, which compilers for accelerators make part of the
    convolution that gave `x`; and first over each example's pixels, for which no axis
    of `x` has to be cut into groups.

    Args:
      x: the batch.
      scale, bias: of each channel.
      near: what the means are expected to be. The variance is found from squares of
        distances to it; those to zero could hide it in what float32 rounds.
      of: the normalisation.
      pool: see `BatchNorm`. What is pooled is `x`: a quarter of it is left to
        normalise, and the output is never as large.

    Returns:
      The output, and the groups' means and variances, float32.
    """
    if pool:
        # The greatest output is that of the greatest input, or, by a negative scale,
        # of the least.
        sign = jnp.where(scale < 0, -1.0, 1.0)
        x, near, scale = x * sign.astype(x.dtype), near * sign, scale * sign
    wide = x.astype(jnp.float32)
    distance = wide - near
    offset = _mean_of_groups(distance, of)
    square = _mean_of_groups(jnp.square(distance), of)
    mean, var = near + offset, jnp.maximum(square - jnp.square(offset), 0)
    factor = scale / jnp.sqrt(var + of.epsilon)
    if pool:
        wide = pool(x).astype(jnp.float32)
    out = (wide - of_examples(mean, of.size)) * of_examples(factor, of.size) + bias
    out = _activate(out, of.activation, of.dtype)
    return out, mean * sign if pool else mean, var


def backward(
    x: Float[Array, "b h w c"],
    g: Float[Array, "b h w c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    mean: Float[Array, "g c"],
    var: Float[Array, "g c"],
    of: Normalization,
) -> tuple[Float[Array, "b h w c"], Float[Array, "c"], Float[Array, "c"]]:
    """The gradients by `x`, scale and bias of `forward` without pooling.

    Args:
      x, scale, bias, of: what `forward` had.
      g: the gradient by its output.
      mean, var: what it gave.
    """
    inverse = 1 / jnp.sqrt(var + of.epsilon)
    spread = functools.partial(of_examples, size=of.size)
    factor = spread(scale * inverse)
    deviation = x.astype(jnp.float32) - spread(mean)
    g = g.astype(jnp.float32)
    if of.activation:
        (g,) = jax.vjp(of.activation, deviation * factor + bias)[1](g)
    total = _mean_of_groups(g, of)
    along = _mean_of_groups(g * deviation, of) * inverse
    # What is left of the gradient without its mean and its part along the deviations.
    rest = g - spread(total) - deviation * spread(along * inverse)
    n = of.pixels(x)
    dx = (rest * factor).astype(x.dtype)
    return dx, n * along.sum(axis=0), n * total.sum(axis=0)


def _mean_of_groups(
    x: Float[Array, "b h w c"], of: Normalization
) -> Float[Array, "g c"]:
    of_examples = x.sum(axis=(1, 2)).reshape(-1, of.size, x.shape[3])
    return of_examples.sum(axis=1) / of.pixels(x)


@jax.jit
def _normalize(x, mean, var, scale, bias, epsilon):
    factor = scale / jnp.sqrt(var + epsilon)
    return (x - mean) * factor + bias


def _activate(x: jax.Array, activation: Callable | None, dtype: DTypeLike) -> jax.Array:
    return (activation(x) if activation else x).astype(dtype)


def _scale_and_bias(module: nn.Module, channels: int, scale_init):
    scale = parameter(module, "scale", scale_init, (channels,))
    bias = parameter(module, "bias", nn.initializers.zeros, (channels,))
    return scale, bias


def _by_group(x: jax.Array, groups: int) -> jax.Array:
    b, h, w, c = x.shape
    if c % groups:
        raise BadValueError(
            f"{c} channels cannot be cut into {groups} groups for group norm; use"
            " widths that the number of groups divides."
        )
    return x.reshape(b, h, w, groups, c // groups)
