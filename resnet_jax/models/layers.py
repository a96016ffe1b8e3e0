"""Convolution and pooling with their geometry given as numbers."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.errors import BadValueError
from resnet_jax.kernels import pool
from resnet_jax.kernels.conv import as_taken, convolve
from resnet_jax.kernels.cpu.conv import Geometry, Padding
from resnet_jax.kernels.tpu.norm import Product
from resnet_jax.models.parameters import parameter

CONV_INITS = {
    # He et al. 2015 (arXiv:1502.01852), as torchvision draws it: normal, fan out.
    "he_fan_out": nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    "lecun_fan_in": nn.initializers.variance_scaling(1.0, "fan_in", "normal"),
    "glorot_uniform": nn.initializers.glorot_uniform(),
}
# What makes up for the variance that an activation takes from a standard normal input;
# of Brock et al.'s code for arXiv:2101.08692.
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
def scaled_activation(name: str) -> Callable:
    """The activation times what makes up for the variance that it takes."""
    gain = ACTIVATION_GAINS[name]
    return lambda x: ACTIVATIONS[name](x) * gain


class Conv(nn.Module):
    """A square 2-D convolution, padded by `dilation * (kernel - 1) // 2`.

    That is torch's usual `padding`; 'SAME' would shift stride-2 outputs by one pixel
    at even input sizes.

    Attributes:
      features: output channels.
      kernel: side of the kernel in pixels.
      stride: step in pixels along both sides.
      dilation: distance in pixels between two taps.
      groups: number of groups of channels that do not see each other.
      bias: whether a bias is added.
      same_padding: pads as TensorFlow's 'SAME' does.
      standardization: `plain`: kernels have mean 0 and variance 1 for each output
        (Qiao et al. 2019, arXiv:1903.10520); `scaled`: and are multiplied by
        1 / sqrt(fan in) and a learned gain (Brock et al. 2021, arXiv:2101.08692).
      epsilon: added to the kernel's variance.
      gain: a constant factor of the kernel, with `scaled`.
      gain_init: initialiser of the learned gain.
      kernel_init, bias_init: initialisers of kernel and bias.
      dtype: type of the computation; parameters are float32.
      deferred: leaves the convolution to the norm that takes it; only for a 1x1 kernel
        of stride 1 without groups and bias.
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
    deferred: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"]
    ) -> Float[Array, "b h2 w2 f"] | Product:
        fan_in = x.shape[-1] // self.groups
        shape = (self.kernel, self.kernel, fan_in, self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape)
        if self.standardization:
            kernel = standardize(kernel, self.epsilon)
        if self.standardization == "scaled":
            learned = parameter(self, "gain", self.gain_init, (self.features,))
            kernel = kernel * (learned * (self.gain * np.prod(shape[:3]) ** -0.5))
        where = Geometry(self.stride, self.padding(x.shape[1:3]), self.dilation)
        x = jnp.asarray(x, self.dtype)
        kernel = as_taken(jnp.asarray(kernel), self.dtype, self.groups)
        if self.deferred:
            return Product(x, kernel)
        x = convolve(x, kernel, where, self.groups)
        if self.bias:
            shape = (self.features,)
            bias = parameter(self, "bias", self.bias_init, shape)
            x = x + bias.astype(self.dtype)
        return x

    def padding(self, sizes: tuple[int, int]) -> Padding:
        """Pixels before and behind along height and width, whose lengths are given."""
        if not self.same_padding:
            pad = self.dilation * (self.kernel - 1) // 2
            return ((pad, pad), (pad, pad))
        side = self.dilation * (self.kernel - 1) + 1
        window, stride = (side, side), (self.stride, self.stride)
        return tuple(lax.padtype_to_pads(sizes, window, stride, "SAME"))


@jax.jit
def standardize(
    kernel: Float[Array, "h w i o"], epsilon: float | Float[Array, ""]
) -> Float[Array, "h w i o"]:
    """Subtracts each output's mean and divides by its standard deviation."""
    mean = kernel.mean(axis=(0, 1, 2))
    variance = jnp.square(kernel - mean).mean(axis=(0, 1, 2))
    return (kernel - mean) * lax.rsqrt(variance + epsilon)


class Head(nn.Module):
    """A linear layer whose sums, bias and output are float32.

    Attributes:
      features: number of outputs.
      kernel_init: initialiser of the kernel [inputs, features].
      dtype: type of the factors of the product.
      bias: what the bias starts with.
    """

    features: int
    kernel_init: Callable
    dtype: DTypeLike = jnp.float32
    bias: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b f"]:
        shape = (x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape)
        bias_init = nn.initializers.constant(self.bias)
        bias = parameter(self, "bias", bias_init, shape[1:])
        product = jnp.dot(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return product + bias


class Dropout(nn.Module):
    """Sets values to zero at random in training, and scales up what stays.

    Srivastava et al. 2014; with `shape_of="example"` all values of an example go
    together: stochastic depth (Huang et al. 2016, arXiv:1603.09382).

    Attributes:
      each: `value` or `example`.
    """

    each: str = "value"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ..."], rate: float | Float[Array, ""], *, train: bool
    ) -> Float[Array, "b ..."]:
        """Drops with probability `rate`; in training it needs the rng `dropout`."""
        if not train:
            return x
        shape = x.shape
        if self.each == "example":
            shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        keep = 1.0 - jnp.asarray(rate, jnp.float32)
        kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
        # Where nothing is kept, 1 / 0 would make the gradient of what is dropped a NaN.
        scale = 1 / jnp.maximum(keep, jnp.finfo(jnp.float32).tiny)
        return jnp.where(kept, x * scale.astype(x.dtype), 0)


def max_pool(
    x: Float[Array, "b h w c"], stride: int = 2, border: str = "max"
) -> Float[Array, "b h2 w2 c"]:
    """3x3 max pooling.

    Args:
      x: what to pool.
      stride: step in pixels.
      border: `max`: one pixel of -inf around, as torchvision; `max_zero_pad`: one
        pixel of zeros, as Keras and BiT; `max_valid`: nothing.
    """
    around = ((1, 1), (1, 1)) if border == "max" else ((0, 0), (0, 0))
    if border == "max_zero_pad":
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return pool.max_pool(x, 3, Geometry(stride, around))


@jax.jit
def average_pool_2x2(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """2x2/2 average pooling; at odd sizes the last row and column stand alone.

    torch's `ceil_mode=True, count_include_pad=False`, as the shortcuts of ResNet-D
    have it: the pixels that are not there do not count.
    """
    _, h, w, _ = x.shape
    padding = ((0, h % 2), (0, w % 2))
    return nn.avg_pool(x, (2, 2), (2, 2), padding, count_include_pad=False)


def average_pool_2x2_in_place(x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """2x2/1 average pooling with zeros below and to the right, which count.

    What timm puts for `average_pool_2x2` where a stride became dilation.
    """
    return nn.avg_pool(x, (2, 2), (1, 1), ((0, 1), (0, 1)))


def average_pool_3x3(
    x: Float[Array, "b h w c"], stride: int
) -> Float[Array, "b h2 w2 c"]:
    """3x3 average pooling with one pixel of zeros around, which count."""
    return nn.avg_pool(x, (3, 3), (stride, stride), ((1, 1), (1, 1)))


def anti_alias(
    x: Float[Array, "b h w c"], kind: str, stride: int
) -> Float[Array, "b h2 w2 c"]:
    """Blurs and subsamples.

    Args:
      x: what to shrink.
      kind: `avg`: the mean of stride x stride pixels, leftover pixels are dropped;
        `blur`: a binomial 3x3 filter over reflected borders (Zhang 2019,
        arXiv:1904.11486).
      stride: step in pixels.
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
    """Mean over height and width, summed in float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)


def pad_shortcut(
    x: Float[Array, "b h w c"], features: int, stride: int, where: str
) -> Float[Array, "b h2 w2 f"]:
    """Option A of He et al. 2015, section 4.2: subsample, and zeros as new channels.

    Args:
      x: the block's input.
      features: channels to reach; raises BadValueError if `x` has more.
      stride: every how many pixels one is kept.
      where: `end` puts all zeros behind the channels, `both` half of them before.
    """
    missing = features - x.shape[-1]
    if missing < 0:
        raise BadValueError(
            f"A pad shortcut cannot go from {x.shape[-1]} to {features} channels, since"
            " it only adds some; take shortcut='projection', or widths that grow."
        )
    before = missing // 2 if where == "both" else 0
    x = x[:, ::stride, ::stride, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, missing - before)))


def make_divisible(value: float, divisor: int, lowest: int, shrink: float) -> int:
    """The multiple of `divisor` next to `value`, at least `lowest`.

    One divisor more where that would be less than `shrink * value`, as timm rounds.
    """
    rounded = max(lowest, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < shrink * value else rounded


def torch_linear_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32):
    """torch.nn.Linear's default: uniform(-1, 1) / sqrt(inputs)."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
