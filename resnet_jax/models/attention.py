"""Attention over channels and over kernels, as some residual blocks have it."""

import functools
import math
import operator
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.models.layers import Conv, global_average_pool, make_divisible

ConvOrNorm = Callable[..., nn.Module]


def squeeze(x: Float[Array, "b h w c"]) -> Float[Array, "b 1 1 c"]:
    """Returns the mean over pixels, as an image of one pixel."""
    return global_average_pool(x)[:, None, None, :]


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation: x sigmoid(W2 relu(W1 mean(x))).

    Hu et al. 2017 (arXiv:1709.01507), figure 2.

    Attributes:
      ratio: The inner channels as a fraction of x's, rounded to a multiple of 8 as in
        timm.
      dtype: The type of the computation.
    """

    ratio: float
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns x times a gate in (0, 1) per example and channel."""
        c = x.shape[-1]
        inner = make_divisible(c * self.ratio, 8, 8, shrink=0.0)
        s = Conv(inner, 1, bias=True, dtype=self.dtype, name="fc1")(squeeze(x))
        s = Conv(c, 1, bias=True, dtype=self.dtype, name="fc2")(nn.relu(s))
        return x * nn.sigmoid(s)


class EfficientChannelAttention(nn.Module):
    """Efficient channel attention: x sigmoid(conv1d over the channels of mean(x)).

    Wang et al. 2019 (arXiv:1910.03151).

    Attributes:
      channels: The number of channels that sets the kernel's size (section 3.3): the
        odd number at or above (log2(channels) + 1) / 2, at least 3.
      dtype: The type of the computation.
    """

    channels: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns x times a gate in (0, 1) per example and channel."""
        size = int(abs(math.log2(self.channels) + 1) / 2)
        size = max(size if size % 2 else size + 1, 3)
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (size, 1, 1), jnp.float32)
        means = global_average_pool(x)
        means = jnp.pad(means, ((0, 0), (size // 2, size // 2)))
        shifted = (
            means[:, i : i + x.shape[-1]] * kernel[i, 0, 0].astype(means.dtype)
            for i in range(size)
        )
        s = functools.reduce(operator.add, shifted)
        return x * nn.sigmoid(s)[:, None, None, :]


class SelectiveKernel(nn.Module):
    """Two 3x3 convolutions, one dilated, whose outputs attention mixes per channel.

    Li et al. 2019 (arXiv:1903.06586), section 3.1.

    Attributes:
      features: The output channels.
      stride: The stride of both convolutions.
      dilation: The dilation of the first convolution; the second has twice as much.
      groups: The number of groups of both convolutions, at most `features`.
      split: True if each convolution sees one half of the channels (timm's skresnets).
      ratio: The inner channels of the attention, as a fraction of `features`.
      divisor: The number that the inner channels are rounded to a multiple of.
      conv: Makes a convolution.
      norm: Makes a norm with its activation.
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
        """Returns the mixed outputs."""
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
    """A 3x3 convolution into `radix` splits, which attention mixes per channel.

    Zhang et al. 2020 (arXiv:2004.08955), section 3.1.

    Attributes:
      features: The output channels.
      stride: The stride of the convolution.
      dilation: The dilation of the convolution.
      groups: The number of cardinal groups, the paper's K.
      radix: The number of splits, the paper's R. With 1 a sigmoid gates the channels
        instead of a softmax over splits.
      conv: Makes a convolution.
      norm: Makes a norm with its activation.
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
        """Returns the mixed outputs."""
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
        s = squeeze(functools.reduce(operator.add, splits))
        s = self.conv(inner, 1, groups=self.groups, bias=True, name="fc1")(s)
        s = self.norm(name="fc1_norm")(s, train=train)
        s = self.conv(c * r, 1, groups=self.groups, bias=True, name="fc2")(s)
        if r == 1:
            return x * nn.sigmoid(s)
        # The channels of fc2 are ordered by group, then split.
        s = s.reshape(s.shape[0], self.groups, r, c // self.groups)
        s = nn.softmax(s, axis=2).swapaxes(1, 2).reshape(s.shape[0], r, 1, 1, c)
        mixed = (split * s[:, i] for i, split in enumerate(splits))
        return functools.reduce(operator.add, mixed)
