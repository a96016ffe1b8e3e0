"""Normalisation layers, each with the activation that follows the norm.

Batch norm computes statistics over ghost batches, which are counted in examples; the
other norms look at one example.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.errors import BadValueError
from resnet_jax.kernels.conv import FusibleConvolution
from resnet_jax.kernels.norm import GhostBatchNorm, batch_norm, update_running


class BatchNorm(nn.Module):
    """Batch norm over ghost batches of `group_size` consecutive examples.

    Ioffe & Szegedy 2015 (arXiv:1502.03167); ghost batches as in Goyal et al. 2017
    (arXiv:1706.02677), section 2.3, where a ghost batch is the part of the batch on one
    GPU. Here its size is a number of examples, so the result does not depend on the
    number of devices. As long as no ghost batch spans two devices, the statistics need
    no communication.

    Statistics are float32. The variance is the mean squared distance to the mean on
    CPUs, and elsewhere the mean squared distance to the running mean, corrected by the
    distance between the two means. A mean of squares of the values themselves would
    cancel where the mean is large. The running statistics follow the mean over ghost
    batches.

    Attributes:
      group_size: Number of examples that share statistics, or None for the whole batch.
      epsilon: Number that is added to the variance.
      momentum: Decay rate of the running statistics: their weight in the new ones.
      unbiased: Multiplies the running variance by n / (n - 1).
      scale_init: Initialiser of the scale.
      activation: Function that is applied to the output, or None.
      pool: Max pooling of the output, or None. With it, the activation must not
        decrease anywhere.
      dtype: Type of the output.
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
        self, x: Float[Array, "b h w c"] | FusibleConvolution, *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        """Normalises by the running statistics, or in training by the ghost batches'.

        Raises:
          BadValueError: `group_size` does not divide the number of examples in
            training.
        """
        b, h, w, c = x.shape
        scale, bias = _scale_and_bias(self, c, self.scale_init)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,))

        if not train:
            if isinstance(x, FusibleConvolution):
                x = x.evaluate()
            out = _normalize(
                x, running_mean.value, running_var.value, scale, bias, self.epsilon
            )
            out = _activate(out, self.activation, self.dtype)
            return self.pool(out) if self.pool else out

        size = self.group_size or b
        if b % size:
            raise BadValueError(
                f"A batch of {b} images cannot be cut into ghost batches of {size}; use"
                " a bn_group_size that divides it."
            )
        out, mean, var = batch_norm(
            x,
            scale,
            bias,
            jnp.asarray(running_mean.value),
            GhostBatchNorm(size, self.epsilon, self.activation, self.dtype),
            pool=self.pool,
        )
        if not self.is_initializing():
            n = size * h * w
            correction = n / max(n - 1, 1) if self.unbiased else 1.0
            running_mean.value = update_running(
                running_mean.value, mean, decay_rate=self.momentum
            )
            running_var.value = update_running(
                running_var.value, var, correction, decay_rate=self.momentum
            )
        return out


class GroupNorm(nn.Module):
    """Group norm in float32; Wu & He 2018 (arXiv:1803.08494).

    Attributes:
      groups: Number of groups of channels.
      epsilon: Number that is added to the variance.
      scale_init: Initialiser of the scale.
      activation: Function that is applied to the output, or None.
      dtype: Type of the output.
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
        """Normalises each example; `train` makes no difference.

        Raises:
          BadValueError: `groups` does not divide the channels.
        """
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
    """EvoNorm-S0, x sigmoid(v x) / std over groups of channels, in float32.

    Liu et al. 2020 (arXiv:2004.02967). Without an activation it is only a scale and a
    bias, as in timm.

    Attributes:
      groups: Number of groups of channels.
      epsilon: Number that is added to the variance.
      scale_init: Initialiser of the scale.
      activation: None leaves the gate and the division out, so that only scale and bias
        are left. Any function keeps them, and is not called.
      dtype: Type of the output.
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
        """Normalises each example; `train` makes no difference.

        Raises:
          BadValueError: `groups` does not divide the channels.
        """
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
    """Filter response norm, x / rms over pixels, then max(., tau), in float32.

    Singh & Krishnan 2019 (arXiv:1911.09737).

    Attributes:
      epsilon: Number that is added to the mean square.
      scale_init: Initialiser of the scale.
      activation: None leaves the threshold tau out. Any function keeps it, and is not
        called.
      dtype: Type of the output.
    """

    epsilon: float = 1e-5
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    activation: Callable | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w c"]:
        """Normalises each example and channel; `train` makes no difference."""
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
    """The activation alone, in place of a norm.

    Attributes:
      activation: Function that is applied, or None.
      dtype: Type of the output.
    """

    activation: Callable | None = None
    dtype: DTypeLike = jnp.float32

    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w c"]:
        """Applies the activation; `train` makes no difference."""
        return _activate(x, self.activation, self.dtype)


def with_activation(
    norm: Callable[..., nn.Module],
    activation: Callable,
    *,
    act: bool = True,
    **attributes,
) -> nn.Module:
    """Makes a norm with an activation.

    Args:
      norm: Maker of the norm.
      activation: The activation.
      act: False leaves the activation out.
      **attributes: Further attributes of the norm.
    """
    return norm(activation=activation if act else None, **attributes)


# One traced function for all calls with equal shapes.
@jax.jit
def _normalize(
    x: Float[Array, "b h w c"],
    mean: Float[Array, "c"],
    var: Float[Array, "c"],
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    epsilon: float | Float[Array, ""],
) -> Float[Array, "b h w c"]:
    factor = scale / jnp.sqrt(var + epsilon)
    return (x - mean) * factor + bias


def _activate(x: jax.Array, activation: Callable | None, dtype: DTypeLike) -> jax.Array:
    return (activation(x) if activation else x).astype(dtype)


def _scale_and_bias(
    module: nn.Module, channels: int, scale_init: nn.initializers.Initializer
) -> tuple[jax.Array, jax.Array]:
    scale = module.param("scale", scale_init, (channels,), jnp.float32)
    bias = module.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    # Parameters may be numpy arrays.
    return jnp.asarray(scale), jnp.asarray(bias)


def _by_group(x: jax.Array, groups: int) -> jax.Array:
    b, h, w, c = x.shape
    if c % groups:
        raise BadValueError(
            f"{c} channels cannot be cut into {groups} groups for group norm; use"
            " widths that the number of groups divides."
        )
    return x.reshape(b, h, w, groups, c // groups)
