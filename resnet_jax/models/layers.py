"""Convolutions, pooling, dropout and the head, with explicit geometry."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.errors import BadValueError
from resnet_jax.kernels import pool
from resnet_jax.kernels.conv import (
    FusibleConvolution,
    Geometry,
    cast_kernel,
    convolve,
    same_padding,
    symmetric_padding,
)

CONV_INITS = {
    # He et al. 2015 (arXiv:1502.01852) as in torchvision: a normal distribution whose
    # variance is 2 / fan out.
    "he_fan_out": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    "lecun_fan_in": nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
    "glorot_uniform": nn.initializers.glorot_uniform(),
}
# Factors that restore the variance of a standard normal input after an activation, from
# the code of Brock et al. (arXiv:2101.08692).
ACTIVATION_GAINS = {
    "relu": 1.7139588594436646,
    "gelu": 1.7015043497085571,
    "silu": 1.7881293296813965,
}
ACTIVATIONS = {
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "silu": nn.silu,
}


@functools.cache
def scaled_activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns an activation times its gain, which restores the input's variance.

    Args:
      name: A name of `ACTIVATION_GAINS`.
    """
    gain = ACTIVATION_GAINS[name]
    return lambda x: ACTIVATIONS[name](x) * gain


def check_groups(channels: int, features: int, groups: int) -> None:
    """Raises BadValueError if a convolution cannot have these numbers of channels."""
    if min(features, groups) < 1 or channels % groups or features % groups:
        raise BadValueError(
            f"A convolution from {channels} to {features} channels in {groups} groups"
            " is not possible: the number of groups must divide both, and none may be"
            " 0. Change the network's widths, base_width, reduce_first, groups,"
            " group_width or radix."
        )


class Conv(nn.Module):
    """A square 2-D convolution, padded like torch's or, on request, TensorFlow's.

    `kernels/geometry.py` has both paddings.

    Attributes:
      features: Output channels.
      kernel: Side of the kernel in pixels.
      stride: Step in pixels along both axes.
      dilation: Distance in pixels between two taps.
      groups: Number of groups of channels that do not see each other.
      bias: Adds a bias.
      same_padding: Pads by `same_padding`, not by `symmetric_padding`.
      standardization: None, or `plain` for kernels of mean 0 and variance 1 for each
        output (Qiao et al. 2019, arXiv:1903.10520), or `scaled` for the same times
        1 / sqrt(fan in) and a learned gain (Brock et al. 2021, arXiv:2101.08692).
      epsilon: Number that is added to the kernel's variance.
      gain: Constant factor of a kernel that is `scaled`.
      gain_init: Initialiser of the learned gain.
      kernel_init: Initialiser of the kernel.
      bias_init: Initialiser of the bias.
      dtype: Type of the computation; parameters are float32.
      fusible: Returns a `FusibleConvolution`, which leaves the computation to the batch
        norm that takes it. It requires a 1x1 kernel of stride 1 without groups or bias.
    """

    features: int
    kernel: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    bias: bool = False
    same_padding: bool = False
    standardization: str | None = None
    epsilon: float = 1e-8
    gain: float = 1.0
    gain_init: nn.initializers.Initializer = nn.initializers.ones
    kernel_init: nn.initializers.Initializer = CONV_INITS["he_fan_out"]
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    dtype: DTypeLike = jnp.float32
    fusible: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Any:
        """Returns the convolved images [b, h2, w2, f], or a `FusibleConvolution`."""
        _, height, width, channels = x.shape
        check_groups(channels, self.features, self.groups)
        shape = (self.kernel, self.kernel, channels // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        if self.standardization:
            kernel = standardize(kernel, self.epsilon)
        if self.standardization == "scaled":
            learned = self.param("gain", self.gain_init, (self.features,), jnp.float32)
            kernel = kernel * (learned * (self.gain * np.prod(shape[:3]) ** -0.5))
        pad = same_padding if self.same_padding else symmetric_padding
        geometry = pad(height, width, self.kernel, self.stride, self.dilation)
        x = jnp.asarray(x, self.dtype)
        kernel = cast_kernel(jnp.asarray(kernel), self.dtype, self.groups)
        if self.fusible:
            return FusibleConvolution(x, kernel)
        x = convolve(x, kernel, geometry, self.groups)
        if self.bias:
            bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
            x = x + bias.astype(self.dtype)
        return x


@jax.jit
def standardize(
    kernel: Float[Array, "h w i o"], epsilon: float | Float[Array, ""]
) -> Float[Array, "h w i o"]:
    """Subtracts each output's mean and divides by its standard deviation.

    Args:
      kernel: The kernel.
      epsilon: Number that is added to the variance.
    """
    mean = kernel.mean(axis=(0, 1, 2))
    variance = jnp.square(kernel - mean).mean(axis=(0, 1, 2))
    return (kernel - mean) * lax.rsqrt(variance + epsilon)


class Head(nn.Module):
    """A linear layer whose sums, bias and output are float32.

    Attributes:
      features: Number of outputs.
      kernel_init: Initialiser of the kernel [inputs, features].
      dtype: Type of the operands of the matmul.
      bias: Initial value of the bias.
    """

    features: int
    kernel_init: Callable
    dtype: DTypeLike = jnp.float32
    bias: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b f"]:
        """Returns float32 logits."""
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias_init = nn.initializers.constant(self.bias)
        bias = self.param("bias", bias_init, shape[1:], jnp.float32)
        logits = jnp.dot(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits + bias


class Dropout(nn.Module):
    """Sets values to zero at random in training, and scales the remaining ones up.

    Srivastava et al. 2014; with `each="example"` all values of an example are dropped
    together, which is stochastic depth (Huang et al. 2016, arXiv:1603.09382).

    Attributes:
      each: The unit that is dropped or kept: a `value` or an `example`.
    """

    each: str = "value"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ..."], rate: float | Float[Array, ""], *, train: bool
    ) -> Float[Array, "b ..."]:
        """Drops values in training, which needs the rng `dropout`.

        Args:
          x: The values.
          rate: The probability that a value (or an example) is dropped.
          train: False drops nothing.
        """
        if not train:
            return x
        shape = x.shape
        if self.each == "example":
            shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        keep = 1.0 - jnp.asarray(rate, jnp.float32)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        # If nothing is kept, 1 / 0 would make the gradient of dropped values a NaN.
        scale = 1 / jnp.maximum(keep, jnp.finfo(jnp.float32).tiny)
        return jnp.where(kept, x * scale.astype(x.dtype), 0)


def max_pool(
    x: Float[Array, "b h w c"], stride: int = 2, border: str = "max"
) -> Float[Array, "b h2 w2 c"]:
    """Computes 3x3 max pooling.

    Args:
      x: The images.
      stride: Step in pixels along both axes.
      border: `max` for one pixel of -inf on each side, as in torchvision;
        `max_zero_pad` for one pixel of zeros, as in Keras and BiT; `max_valid` for no
        padding.
    """
    padding = ((1, 1), (1, 1)) if border == "max" else ((0, 0), (0, 0))
    if border == "max_zero_pad":
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return pool.max_pool(x, 3, Geometry(stride, padding))


@jax.jit
def average_pool_2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Computes 2x2 average pooling of stride 2, as in the shortcuts of ResNet-D.

    At odd sizes the windows of the last row and column are cut off, and the missing
    pixels do not count: torch's `ceil_mode=True, count_include_pad=False`.
    """
    _, h, w, _ = x.shape
    padding = ((0, h % 2), (0, w % 2))
    return nn.avg_pool(x, (2, 2), (2, 2), padding, count_include_pad=False)


def average_pool_2x2_in_place(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """Computes 2x2 average pooling of stride 1 with zeros below and on the right.

    The zeros count. timm uses it instead of `average_pool_2x2` where dilation replaces
    a stride.
    """
    return nn.avg_pool(x, (2, 2), (1, 1), ((0, 1), (0, 1)))


def average_pool_3x3(
    x: Float[Array, "b h w c"], stride: int
) -> Float[Array, "b h2 w2 c"]:
    """Computes 3x3 average pooling with one pixel of zeros on each side, which count.

    Args:
      x: The images.
      stride: Step in pixels along both axes.
    """
    return nn.avg_pool(x, (3, 3), (stride, stride), ((1, 1), (1, 1)))


def anti_alias(
    x: Float[Array, "b h w c"], kind: str, stride: int
) -> Float[Array, "b h2 w2 c"]:
    """Blurs and subsamples images.

    Args:
      x: The images.
      kind: `avg` for the mean of each stride x stride pixels, without leftover pixels;
        `blur` for a binomial 3x3 filter over reflected borders (Zhang 2019,
        arXiv:1904.11486).
      stride: Step in pixels along both axes.
    """
    if kind == "avg":
        return nn.avg_pool(x, (stride, stride), (stride, stride))
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    line = np.array([1, 2, 1], np.float32) / 4
    kernel = jnp.asarray(line[:, None] * line, x.dtype)[:, :, None, None]
    return lax.conv_general_dilated(
        x,
        jnp.tile(kernel, (1, 1, 1, x.shape[-1])),
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def global_average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """Returns the mean over height and width, summed in float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)


def pad_shortcut(
    x: Float[Array, "b h w c"], features: int, stride: int, position: str
) -> Float[Array, "b h2 w2 f"]:
    """Subsamples images and adds channels of zeros; He et al. 2015, 4.2, option A.

    Args:
      x: The block's input.
      features: The number of channels of the result.
      stride: Step in pixels along both axes.
      position: `end` adds all zeros after the channels, `both` half of them before.

    Raises:
      BadValueError: `x` has more channels than `features`.
    """
    missing = features - x.shape[-1]
    if missing < 0:
        raise BadValueError(
            f"A pad shortcut cannot go from {x.shape[-1]} to {features} channels, since"
            " it only adds channels; use shortcut='projection', or widths that grow."
        )
    before = missing // 2 if position == "both" else 0
    x = x[:, ::stride, ::stride, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, missing - before)))


def make_divisible(value: float, divisor: int, lowest: int, shrink: float) -> int:
    """Returns the multiple of `divisor` nearest to `value`, rounded as in timm.

    Args:
      value: The number to round.
      divisor: The divisor of the result.
      lowest: The smallest result.
      shrink: The smallest allowed result as a fraction of `value`; a multiple below it
        is raised by one divisor.
    """
    rounded = max(lowest, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < shrink * value else rounded


def torch_linear_init(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Draws torch.nn.Linear's initial kernel: uniform(-1, 1) / sqrt(inputs).

    Args:
      key: The random key.
      shape: The kernel's shape, inputs first.
      dtype: The kernel's dtype.
    """
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
