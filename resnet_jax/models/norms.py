"""Normalisation, with the activation that follows it.

Batch norm's groups are counted in examples; the other norms look at one example.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.models import cpu_norm


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
        must be a multiple of it (ValueError).
      epsilon: added to the variance.
      momentum: keep-momentum of the running statistics.
      unbiased: whether the running variance is multiplied by n / (n - 1).
      scale_init: initialiser of the scale.
      activation: applied to the output, or None.
      pool: max pooling of the output, or None; with it, the activation must not
        decrease anywhere.
      dtype: type of the output.
    """

    group_size: int | None = None
    epsilon: float = 1e-5
    momentum: float = 0.9
    unbiased: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    activation: Callable | None = None
    pool: Callable | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 c"]:
        b, h, w, c = x.shape
        scale = self.param("scale", self.scale_init, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,))

        if not train:
            x = _normalize(
                x, running_mean.value, running_var.value, scale, bias, self.epsilon
            )
            x = _activate(x, self.activation, self.dtype)
            return self.pool(x) if self.pool else x

        size = self.group_size or b
        if b % size:
            raise ValueError(f"a batch of {b} cannot be cut into groups of {size}")
        out, mean, var = _normalize_on_platform(
            *map(jnp.asarray, (x, scale, bias, lax.stop_gradient(running_mean.value))),
            size=size,
            epsilon=self.epsilon,
            activation=self.activation,
            pool=self.pool,
            dtype=self.dtype,
        )

        if not self.is_initializing():
            n = size * h * w
            correction = n / max(n - 1, 1) if self.unbiased else 1.0
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * (
                mean.mean(axis=0)
            )
            running_var.value = keep * running_var.value + (1 - keep) * (
                correction * var.mean(axis=0)
            )
        return out


class GroupNorm(nn.Module):
    """Wu & He 2018 (arXiv:1803.08494), in float32.

    Attributes:
      groups: number of groups of channels; must divide the channels (ValueError).
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
            v = self.param("v", nn.initializers.ones, (c,), jnp.float32)
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
            x = jnp.maximum(x, self.param("tau", zeros, (c,), jnp.float32))
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


# Equal norms are traced once; inlined, since calls make other TPU programs.
@functools.partial(
    jax.jit,
    static_argnames=("size", "epsilon", "activation", "pool", "dtype"),
    inline=True,
)
def _normalize_on_platform(x, scale, bias, near, *, pool, **options):
    """`normalize_groups`, in the way that suits the platform."""

    def on_cpu(x, scale, bias, near):
        out, mean, var = cpu_norm.normalize_groups(x, scale, bias, **options)
        return pool(out) if pool else out, mean, var

    default = functools.partial(normalize_groups, pool=pool, **options)
    return lax.platform_dependent(x, scale, bias, near, cpu=on_cpu, default=default)


def normalize_groups(
    x: Float[Array, "b h w c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    near: Float[Array, "c"],
    *,
    size: int,
    epsilon: float,
    activation: Callable | None,
    dtype: DTypeLike,
    pool: Callable | None = None,
) -> tuple[Float[Array, "b h2 w2 c"], Float[Array, "g c"], Float[Array, "g c"]]:
    """Normalises each `size` consecutive examples and applies activation and pooling.

    Both sums are taken in one pass, which compilers for accelerators make part of the
    convolution that gave `x`; and first over each example's pixels, for which no axis
    of `x` has to be cut into groups.

    Args:
      x: the batch.
      scale, bias: of each channel.
      near: what the means are expected to be. The variance is found from squares of
        distances to it; those to zero could hide it in what float32 rounds.
      size, epsilon, activation, dtype, pool: see `BatchNorm`. What is pooled is `x`:
        a quarter of it is left to normalise, and the output is never as large.

    Returns:
      The output, and the groups' means and variances, float32.
    """
    _, h, w, c = x.shape

    def of_groups(examples: Float[Array, "b c"]) -> Float[Array, "g c"]:
        return examples.reshape(-1, size, c).sum(axis=1) / (size * h * w)

    def of_examples(groups: Float[Array, "g c"]) -> Float[Array, "b 1 1 c"]:
        return jnp.repeat(groups, size, axis=0)[:, None, None]

    if pool:
        # The greatest output is that of the greatest input, or, by a negative scale,
        # of the least.
        sign = jnp.where(scale < 0, -1.0, 1.0)
        x, near, scale = x * sign.astype(x.dtype), near * sign, scale * sign
    wide = x.astype(jnp.float32)
    distance = wide - near
    offset = of_groups(distance.sum(axis=(1, 2)))
    square = of_groups(jnp.square(distance).sum(axis=(1, 2)))
    mean, var = near + offset, jnp.maximum(square - jnp.square(offset), 0)
    factor = scale / jnp.sqrt(var + epsilon)
    if pool:
        wide = pool(x).astype(jnp.float32)
    out = (wide - of_examples(mean)) * of_examples(factor) + bias
    return _activate(out, activation, dtype), mean * sign if pool else mean, var


@jax.jit
def _normalize(x, mean, var, scale, bias, epsilon):
    factor = scale / jnp.sqrt(var + epsilon)
    return (x - mean) * factor + bias


def _activate(x: jax.Array, activation: Callable | None, dtype: DTypeLike) -> jax.Array:
    return (activation(x) if activation else x).astype(dtype)


def _scale_and_bias(module: nn.Module, channels: int, scale_init):
    scale = module.param("scale", scale_init, (channels,), jnp.float32)
    bias = module.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    return scale, bias


def _by_group(x: jax.Array, groups: int) -> jax.Array:
    b, h, w, c = x.shape
    if c % groups:
        raise ValueError(f"{c} channels cannot be cut into {groups} groups")
    return x.reshape(b, h, w, groups, c // groups)
