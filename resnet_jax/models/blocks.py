"""Residual blocks: the sum of a shortcut and a residual function."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from resnet_jax.errors import BadValueError
from resnet_jax.models import layers
from resnet_jax.models.attention import (
    EfficientChannelAttention,
    SelectiveKernel,
    SplitAttention,
    SqueezeExcite,
)
from resnet_jax.models.spec import BlockPlan, ResNetSpec

Scalar = float | Float[Array, ""]


class Shortcut(nn.Module):
    """What a block adds to its residual function: x, or x brought to its shape.

    He et al. 2015 (arXiv:1512.03385), section 3.3, options A and B; with pooling, He
    et al. 2018 (arXiv:1812.01187), figure 2c. Pre-activation blocks have no norm here.
    """

    spec: ResNetSpec
    plan: BlockPlan
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        spec, plan = self.spec, self.plan
        if spec.shortcut == "pad":
            return layers.pad_shortcut(x, plan.features, plan.stride, spec.pad_channels)
        kernel, stride, dilation = 1, plan.stride, 1
        if spec.shortcut_pool:
            if plan.stride > 1:
                x = layers.average_pool_2x2(x)
            elif plan.dilation[1] > 1:
                x = layers.average_pool_2x2_in_place(x)
            stride = 1
        elif plan.stride > 1 or plan.dilation[1] > 1:
            kernel, dilation = spec.shortcut_kernel, plan.dilation[0]
        x = self.conv(
            plan.features,
            kernel,
            stride,
            dilation=dilation,
            bias="shortcut" in spec.biased,
            name="conv",
        )(x)
        return x if spec.preact else self.norm(name="norm", act=False)(x, train=train)


class Block(nn.Module):
    """What all blocks have in common.

    Attributes:
      spec: of the network.
      plan: what this block is.
      conv, norm: makers of layers; a norm's activation is left out by `act=False`.
    """

    spec: ResNetSpec
    plan: BlockPlan
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    def convolve(self, x, number: int, kernel: int, **more):
        """Applies the convolution `conv1`, ... to x."""
        spec, plan = self.spec, self.plan
        if number == self.last:
            features = plan.features
            if spec.preact and spec.zero_init_last:
                more["kernel_init"] = nn.initializers.zeros
        else:
            features = plan.widths[number - 1]
        name = f"conv{number}"
        more = {"bias": name in spec.biased, "name": name} | more
        return self.conv(features, kernel, **more)(x)

    @property
    def bottleneck_strides(self) -> tuple[int, int]:
        """Of a bottleneck's first 1x1 and of its 3x3."""
        stride = self.plan.stride
        return (stride, 1) if self.spec.stride_at == "1x1" else (1, stride)

    def spread(self, x, number: int, stride: int, dilation: int, *, train: bool):
        """Applies a 3x3 convolution, norm and activation; blurs where it would stride.

        With `selective_kernel`, two 3x3 in place of one.
        """
        spec, plan = self.spec, self.plan
        if spec.spatial == "selective_kernel":
            return SelectiveKernel(
                plan.widths[1],
                stride,
                dilation,
                plan.groups,
                spec.sk_split,
                spec.sk_ratio,
                spec.sk_divisor,
                self.conv,
                self.norm,
                name=f"conv{number}",
            )(x, train=train)
        blur = spec.anti_alias and (stride > 1 or plan.dilation[0] != plan.dilation[1])
        x = self.convolve(
            x,
            number,
            3,
            stride=1 if blur else stride,
            dilation=dilation,
            groups=plan.groups,
        )
        x = self.norm(name=f"norm{number}")(x, train=train)
        return layers.anti_alias(x, spec.anti_alias, stride) if blur else x

    def attend(self, x):
        """Applies the attention of the spec, if there is any."""
        if self.spec.attention == "se":
            return SqueezeExcite(self.spec.se_ratio, x.dtype, name="attention")(x)
        if self.spec.attention == "eca":
            channels = self.plan.attended
            return EfficientChannelAttention(channels, x.dtype, name="attention")(x)
        return x

    def drop(self, x, rate: Scalar, *, train: bool):
        """Leaves the residual function out for some examples."""
        if not self.spec.drop_path:
            return x
        return layers.Dropout("example", name="drop_path")(x, rate, train=train)

    def add_and_activate(self, x, residual, drop_path: Scalar, *, train: bool):
        """act(shortcut(x) + residual), the end of all but pre-activation blocks."""
        residual = self.drop(self.attend(residual), drop_path, train=train)
        if self.spec.shortcut != "none":
            residual = same_size(self.shortcut(x, train=train), residual) + residual
        return layers.ACTIVATIONS[self.spec.activation](residual)

    def shortcut(self, x, *, train: bool):
        """x, or x projected where the block changes the shape."""
        if not self.plan.project:
            return x
        return Shortcut(self.spec, self.plan, self.conv, self.norm, name="shortcut")(
            x, train=train
        )

    def last_norm(self, number: int, x, *, train: bool):
        """The norm that ends a residual function."""
        zero = self.spec.zero_init_last
        init = nn.initializers.zeros if zero else nn.initializers.ones
        return self.norm(scale_init=init, act=False, name=f"norm{number}")(
            x, train=train
        )


class BasicBlock(Block):
    """norm(3x3(act(norm(3x3(x))))); He et al. 2015, figure 5 left."""

    last = 2

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_path: Scalar,
        beta: Scalar,
        *,
        train: bool,
    ) -> Float[Array, "b h2 w2 f"]:
        first, second = self.plan.dilation
        y = self.spread(x, 1, self.plan.stride, first, train=train)
        y = self.convolve(y, 2, 3, dilation=second)
        y = self.last_norm(2, y, train=train)
        return self.add_and_activate(x, y, drop_path, train=train)


class BottleneckBlock(Block):
    """norm(1x1(act(norm(3x3(act(norm(1x1(x))))))); He et al. 2015, figure 5 right."""

    last = 3

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_path: Scalar,
        beta: Scalar,
        *,
        train: bool,
    ) -> Float[Array, "b h2 w2 f"]:
        spec, plan = self.spec, self.plan
        stride_1x1, stride_3x3 = self.bottleneck_strides
        y = self.convolve(x, 1, 1, stride=stride_1x1)
        y = self.norm(name="norm1")(y, train=train)
        if spec.spatial == "split_attention":
            y = self.split_attention(y, train=train)
        elif spec.spatial == "hierarchical":
            y = self.hierarchical(y, train=train)
        else:
            y = self.spread(y, 2, stride_3x3, plan.dilation[0], train=train)
        # Batch norm may fuse with the convolution before it.
        fusible = spec.norm == "batch" and "conv3" not in spec.biased
        y = self.convolve(y, 3, 1, fusible=fusible)
        y = self.last_norm(3, y, train=train)
        return self.add_and_activate(x, y, drop_path, train=train)

    def split_attention(self, x, *, train: bool):
        """Split attention; 3x3 average pooling carries the stride."""
        spec, plan = self.spec, self.plan
        if plan.stride > 1 and spec.downsample_first:
            x = layers.average_pool_3x3(x, plan.stride)
        x = SplitAttention(
            plan.widths[1],
            1,
            plan.dilation[0],
            plan.groups,
            spec.radix,
            self.conv,
            self.norm,
            name="conv2",
        )(x, train=train)
        if plan.stride > 1 and not spec.downsample_first:
            x = layers.average_pool_3x3(x, plan.stride)
        return x

    def hierarchical(self, x, *, train: bool):
        """Splits of the channels, each convolved with what came of the one before.

        Gao et al. 2019 (arXiv:1904.01169), figure 2b; where the shape changes, each
        split is convolved alone and the last one is pooled, as in the authors' code.
        """
        plan = self.plan
        *splits, rest = jnp.split(x, self.spec.scale, axis=-1)
        outputs = []
        for i, split in enumerate(splits, 1):
            if outputs and not plan.project:
                split = split + outputs[-1]
            y = self.conv(
                plan.widths[1],
                3,
                plan.stride,
                dilation=plan.dilation[0],
                groups=plan.groups,
                name=f"conv2_{i}",
            )(split)
            outputs.append(self.norm(name=f"norm2_{i}")(y, train=train))
        if plan.project:
            rest = layers.average_pool_3x3(rest, plan.stride)
        return jnp.concatenate([*outputs, rest], axis=-1)


class PreactBlock(Block):
    """x + f(x), each convolution after a norm and an activation.

    He et al. 2016 (arXiv:1603.05027), figure 1b. Where the shape changes, the shortcut
    starts from what the first norm and activation give.
    """

    def add(self, x, first, residual, drop_path: Scalar, *, train: bool):
        """shortcut + residual; `first` is the first norm's output."""
        residual = self.drop(residual, drop_path, train=train)
        if self.spec.shortcut == "none":
            return residual
        stride = self.plan.stride
        if x.shape[-1] != self.plan.features:
            x = self.shortcut(first, train=train)
        elif stride > 1:
            x = x[:, ::stride, ::stride, :]
        return same_size(x, residual) + residual


class PreactBasicBlock(PreactBlock):
    """3x3(act(norm(3x3(act(norm(x))))))."""

    last = 2

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_path: Scalar,
        beta: Scalar,
        *,
        train: bool,
    ) -> Float[Array, "b h2 w2 f"]:
        spec, plan = self.spec, self.plan
        first = self.norm(name="norm1")(x, train=train)
        y = self.convolve(first, 1, 3, stride=plan.stride, dilation=plan.dilation[0])
        y = self.norm(name="norm2")(y, train=train)
        if spec.block_dropout:
            y = layers.Dropout(name="dropout")(y, spec.block_dropout, train=train)
        y = self.convolve(y, 2, 3, dilation=plan.dilation[1])
        return self.add(x, first, y, drop_path, train=train)


class PreactBottleneckBlock(PreactBlock):
    """1x1(act(norm(3x3(act(norm(1x1(act(norm(x)))))))))."""

    last = 3

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_path: Scalar,
        beta: Scalar,
        *,
        train: bool,
    ) -> Float[Array, "b h2 w2 f"]:
        plan = self.plan
        stride_1x1, stride_3x3 = self.bottleneck_strides
        first = self.norm(name="norm1")(x, train=train)
        y = self.convolve(first, 1, 1, stride=stride_1x1)
        y = self.norm(name="norm2")(y, train=train)
        y = self.convolve(
            y, 2, 3, stride=stride_3x3, dilation=plan.dilation[0], groups=plan.groups
        )
        y = self.norm(name="norm3")(y, train=train)
        y = self.convolve(y, 3, 1)
        return self.add(x, first, y, drop_path, train=train)


class NormFreeBlock(Block):
    """shortcut + alpha f(beta act(x)), without any norm.

    Brock et al. 2021 (arXiv:2101.08692, section 3; arXiv:2102.06171, figure 6).
    """

    last = 3

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        drop_path: Scalar,
        beta: Scalar,
        *,
        train: bool,
    ) -> Float[Array, "b h2 w2 f"]:
        spec, plan = self.spec, self.plan
        before, after = plan.dilation
        first = self.norm(name="norm1")(x, train=train) * beta
        y = self.convolve(first.astype(x.dtype), 1, 1)
        y = self.norm(name="norm2")(y, train=train)
        y = self.convolve(
            y, 2, 3, stride=plan.stride, dilation=before, groups=plan.groups
        )
        if spec.extra_conv:
            y = self.norm(name="norm2b")(y, train=train)
            y = self.convolve(
                y, 2, 3, dilation=after, groups=plan.groups, name="conv2b"
            )
        y = self.norm(name="norm3")(y, train=train)
        # Without a skip gain the block starts as its shortcut by a gain of zero here.
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        y = self.convolve(y, 3, 1, gain_init=ones if spec.skip_gain else zeros)
        if spec.attention:
            # A gate halves what passes; the paper's factor makes up for it.
            y = 2 * self.attend(y)
        y = self.drop(y, drop_path, train=train)
        if spec.skip_gain:
            y = y * self.param("skip_gain", zeros, (), jnp.float32).astype(y.dtype)
        shortcut = self.shortcut(first if plan.project else x, train=train)
        return same_size(shortcut, y) + spec.alpha * y


def same_size(shortcut, residual):
    """Returns the shortcut; raises BadValueError if it cannot be added."""
    if shortcut.shape != residual.shape:
        raise BadValueError(
            f"A shortcut gives {shortcut.shape[1:]}, its block {residual.shape[1:]}:"
            " this network needs image sides that its strides divide."
        )
    return shortcut


BLOCKS = {
    "basic": BasicBlock,
    "bottleneck": BottleneckBlock,
    "preact_basic": PreactBasicBlock,
    "preact_bottleneck": PreactBottleneckBlock,
    "norm_free": NormFreeBlock,
}
