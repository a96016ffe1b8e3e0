"""Attention over channels and over kernels."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.models.layers import Conv, global_average_pool, make_divisible

ConvOrNorm = Callable[..., nn.Module]


def squeeze(x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
    """The mean over pixels, as an image of one pixel."""
    return global_average_pool(x)[:, None, None, :]


class SqueezeExcite(nn.Module):
    """x sigmoid(W2 relu(W1 mean(x))); Hu et al. 2017 (arXiv:1709.01507), figure 2.

    Attributes:
      ratio: inner channels as a part of x's, rounded to a multiple of 8 as timm does.
      dtype: type of the computation.
    """

    ratio: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        c = x.shape[-1]
        inner = make_divisible(c * self.ratio, 8, 8, shrink=0.0)
        s = Conv(inner, 1, bias=True, dtype=self.dtype, name="fc1")(squeeze(x))
        s = Conv(c, 1, bias=True, dtype=self.dtype, name="fc2")(nn.relu(s))
        return x * nn.sigmoid(s)


class EfficientChannelAttention(nn.Module):
    """x sigmoid(conv1d over channels of mean(x)); Wang et al. 2019 (arXiv:1910.03151).

    Attributes:
      channels: from which the kernel's size follows (section 3.3): the odd number at
        or above (log2(channels) + 1) / 2, at least 3.
      dtype: type of the computation.
    """

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        size = int(abs(math.log2(self.channels) + 1) / 2)
        size = max(size if size % 2 else size + 1, 3)
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (size, 1, 1), jnp.float32)
        s = global_average_pool(x)
        around = size // 2
        s = jnp.pad(s, ((0, 0), (around, around)))
        s = sum(
            s[:, i : i + x.shape[-1]] * kernel[i, 0, 0].astype(s.dtype)
            for i in range(size)
        )
        return x * nn.sigmoid(s)[:, None, None, :]


class SelectiveKernel(nn.Module):
    """Two 3x3 convolutions, one dilated, mixed by attention for each channel.

    Li et al. 2019 (arXiv:1903.06586), section 3.1.

    Attributes:
      features: output channels.
      stride, dilation, groups: of both convolutions; one is dilated twice as much.
      split: each convolution sees one half of the channels (timm's skresnets).
      ratio, divisor: inner channels as a part of `features`, and their divisor.
      conv, norm: makers of layers.
    """

    features: int
    stride: int
    dilation: int
    groups: int
    split: bool
    ratio: float
    divisor: int
    conv: ConvOrNorm
    norm: ConvOrNorm

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        inputs = jnp.split(x, 2, axis=-1) if self.split else (x, x)
        paths = []
        for i, part in enumerate(inputs, 1):
            y = self.conv(
                self.features,
                3,
                self.stride,
                dilation=self.dilation * i,
                groups=min(self.groups, self.features),
                name=f"path{i}_conv",
            )(part)
            paths.append(self.norm(name=f"path{i}_norm")(y, train=train))
        inner = make_divisible(
            self.features * self.ratio, self.divisor, self.divisor, shrink=0.9
        )
        s = self.conv(inner, 1, name="reduce_conv")(squeeze(paths[0] + paths[1]))
        s = self.norm(name="reduce_norm")(s, train=train)
        s = self.conv(2 * self.features, 1, name="select_conv")(s)
        weights = nn.softmax(jnp.stack(jnp.split(s, 2, axis=-1)), axis=0)
        return paths[0] * weights[0] + paths[1] * weights[1]


class SplitAttention(nn.Module):
    """A 3x3 convolution into `radix` splits, mixed by attention for each channel.

    Zhang et al. 2020 (arXiv:2004.08955), section 3.1.

    Attributes:
      features: output channels.
      stride, dilation, groups: of the convolution; `groups` is the paper's K.
      radix: number of splits, the paper's R; 1: gates instead of a softmax.
      conv, norm: makers of layers.
    """

    features: int
    stride: int
    dilation: int
    groups: int
    radix: int
    conv: ConvOrNorm
    norm: ConvOrNorm

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        c, r = self.features, self.radix
        inner = make_divisible(x.shape[-1] * r / 4, 8, 32, shrink=0.9)
        x = self.conv(
            c * r,
            3,
            self.stride,
            dilation=self.dilation,
            groups=self.groups * r,
            name="conv",
        )(x)
        x = self.norm(name="norm")(x, train=train)
        splits = jnp.split(x, r, axis=-1)
        s = squeeze(sum(splits))
        s = self.conv(inner, 1, groups=self.groups, bias=True, name="fc1")(s)
        s = self.norm(name="fc1_norm")(s, train=train)
        s = self.conv(c * r, 1, groups=self.groups, bias=True, name="fc2")(s)
        if r == 1:
            return x * nn.sigmoid(s)
        # The channels of fc2 are ordered by group, then split.
        s = s.reshape(s.shape[0], self.groups, r, c // self.groups)
        s = nn.softmax(s, axis=2).swapaxes(1, 2).reshape(s.shape[0], r, 1, 1, c)
        return sum(split * s[:, i] for i, split in enumerate(splits))
