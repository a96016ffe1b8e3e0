"""Residual blocks, each the sum of a shortcut and a residual function."""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
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
from resnet_jax.models.spec import BlockName, BlockPlan, ResNetSpec

Scalar = float | Float[Array, ""]


class Shortcut(nn.Module):
    """The shortcut of a block that changes the shape: x, brought to the new shape.

    He et al. 2015 (arXiv:1512.03385), section 3.3, options A and B; with pooling, He
    et al. 2018 (arXiv:1812.01187), figure 2c. Pre-activation blocks have no norm here.

    Attributes:
      spec: The network.
      plan: The block.
      conv: Makes a convolution.
      norm: Makes a norm, without its activation if `act=False`.
    """

    spec: ResNetSpec
    plan: BlockPlan
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        """Returns x in the shape of the block's output."""
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
    """The base class of blocks: parts that several kinds of block share.

    A subclass is called with `plan.numbers()` and `train`.

    Attributes:
      spec: The network.
      plan: The block.
      conv: Makes a convolution.
      norm: Makes a norm, without its activation if `act=False`.
      last: The number of the last convolution, which each subclass sets.
    """

    last: ClassVar[int]

    spec: ResNetSpec
    plan: BlockPlan
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    def convolve(
        self, x: Float[Array, "b h w c"], number: int, kernel: int, **options: Any
    ) -> Any:
        """Applies the convolution `conv1`, `conv2` or `conv3` of the block.

        Args:
          x: The input.
          number: The number of the convolution.
          kernel: The side of its kernel in pixels.
          **options: Attributes of `layers.Conv`.
        """
        spec, plan = self.spec, self.plan
        if number == self.last:
            features = plan.features
            if spec.preact and spec.zero_init_last:
                options["kernel_init"] = nn.initializers.zeros
        else:
            features = plan.widths[number - 1]
        name = f"conv{number}"
        options = {"bias": name in spec.biased, "name": name} | options
        return self.conv(features, kernel, **options)(x)

    @property
    def bottleneck_strides(self) -> tuple[int, int]:
        """The strides of a bottleneck's first 1x1 and of its 3x3 convolution."""
        stride = self.plan.stride
        return (stride, 1) if self.spec.stride_at == "1x1" else (1, stride)

    def spatial_mixing(
        self,
        x: Float[Array, "b h w c"],
        number: int,
        stride: int,
        dilation: int,
        *,
        train: bool,
    ) -> Float[Array, "b h2 w2 f"]:
        """Applies a 3x3 convolution, norm and activation.

        With `anti_alias` a blur carries the stride. With `selective_kernel` two 3x3
        convolutions take the place of one.

        Args:
          x: The input.
          number: The number of the convolution, which names its variables.
          stride: Step in pixels along both axes.
          dilation: Distance in pixels between two taps.
          train: Turns on batch norm by the batch's statistics.
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
        changes_dilation = plan.dilation[0] != plan.dilation[1]
        blur = spec.anti_alias if stride > 1 or changes_dilation else None
        x = self.convolve(
            x,
            number,
            3,
            stride=1 if blur else stride,
            dilation=dilation,
            groups=plan.groups,
        )
        x = self.norm(name=f"norm{number}")(x, train=train)
        return layers.anti_alias(x, blur, stride) if blur else x

    def attend(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Applies the spec's attention, if it has any."""
        if self.spec.attention == "se":
            return SqueezeExcite(self.spec.se_ratio, x.dtype, name="attention")(x)
        if self.spec.attention == "eca":
            channels = self.plan.nominal_features
            return EfficientChannelAttention(channels, x.dtype, name="attention")(x)
        return x

    def drop(
        self, x: Float[Array, "b h w c"], rate: Scalar, *, train: bool
    ) -> Float[Array, "b h w c"]:
        """Drops the residual function of some examples in training (drop path).

        Args:
          x: The output of the residual function.
          rate: The probability that an example's is dropped.
          train: False drops nothing.
        """
        if not self.spec.drop_path:
            return x
        return layers.Dropout("example", name="drop_path")(x, rate, train=train)

    def add_and_activate(
        self,
        x: Float[Array, "b h w c"],
        residual: Float[Array, "b h2 w2 f"],
        drop_path: Scalar,
        *,
        train: bool,
    ) -> Float[Array, "b h2 w2 f"]:
        """Returns act(shortcut(x) + residual), the end of a post-activation block.

        Args:
          x: The block's input.
          residual: The output of the residual function, before attention.
          drop_path: The probability that an example's residual function is dropped.
          train: True to drop at all.
        """
        residual = self.drop(self.attend(residual), drop_path, train=train)
        if self.spec.shortcut != "none":
            residual = same_size(self.shortcut(x, train=train), residual) + residual
        return layers.ACTIVATIONS[self.spec.activation](residual)

    def shortcut(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        """Returns x, projected if the block changes the shape."""
        if not self.plan.project:
            return x
        return Shortcut(self.spec, self.plan, self.conv, self.norm, name="shortcut")(
            x, train=train
        )

    def last_norm(self, x: Any, *, train: bool) -> Float[Array, "b h w f"]:
        """Applies the norm that ends a residual function."""
        zero = self.spec.zero_init_last
        init = nn.initializers.zeros if zero else nn.initializers.ones
        return self.norm(scale_init=init, act=False, name=f"norm{self.last}")(
            x, train=train
        )


class BasicBlock(Block):
    """Two 3x3 convolutions (He et al. 2015, figure 5 left).

    f(x) = norm(3x3(act(norm(3x3(x)))))
    """

    last = 2

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], drop_path: Scalar, *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        """Returns the block's output."""
        first, second = self.plan.dilation
        y = self.spatial_mixing(x, 1, self.plan.stride, first, train=train)
        y = self.convolve(y, 2, 3, dilation=second)
        y = self.last_norm(y, train=train)
        return self.add_and_activate(x, y, drop_path, train=train)


class BottleneckBlock(Block):
    """1x1, 3x3 and 1x1 convolutions (He et al. 2015, figure 5 right).

    f(x) = norm(1x1(act(norm(3x3(act(norm(1x1(x))))))))
    """

    last = 3

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], drop_path: Scalar, *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        """Returns the block's output."""
        spec, plan = self.spec, self.plan
        stride_1x1, stride_3x3 = self.bottleneck_strides
        y = self.convolve(x, 1, 1, stride=stride_1x1)
        y = self.norm(name="norm1")(y, train=train)
        if spec.spatial == "split_attention":
            y = self.split_attention(y, train=train)
        elif spec.spatial == "hierarchical":
            y = self.hierarchical(y, train=train)
        else:
            y = self.spatial_mixing(y, 2, stride_3x3, plan.dilation[0], train=train)
        # On some platforms batch norm and the convolution before it are fused.
        fusible = spec.norm == "batch" and "conv3" not in spec.biased
        y = self.convolve(y, 3, 1, fusible=fusible)
        y = self.last_norm(y, train=train)
        return self.add_and_activate(x, y, drop_path, train=train)

    def split_attention(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        """Applies split attention; 3x3 average pooling carries the stride."""
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

    def hierarchical(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        """Convolves splits of the channels, each added to the output of the one before.

        Gao et al. 2019 (arXiv:1904.01169), figure 2b. If the block changes the shape,
        each split is convolved alone and the last one is average-pooled, as in the
        authors' code.
        """
        plan = self.plan
        *splits, last_split = jnp.split(x, self.spec.scale, axis=-1)
        outputs: list[Float[Array, "b h2 w2 f"]] = []
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
            last_split = layers.average_pool_3x3(last_split, plan.stride)
        return jnp.concatenate([*outputs, last_split], axis=-1)


class PreactBlock(Block):
    """The base class of pre-activation blocks, x + f(x) without a last activation.

    He et al. 2016 (arXiv:1603.05027), figure 1b. If the block changes the shape, the
    shortcut starts from the output of the first norm and activation.
    """

    def add(
        self,
        x: Float[Array, "b h w c"],
        first: Float[Array, "b h w c"],
        residual: Float[Array, "b h2 w2 f"],
        drop_path: Scalar,
        *,
        train: bool,
    ) -> Float[Array, "b h2 w2 f"]:
        """Returns the sum of the shortcut and the residual function.

        Args:
          x: The block's input.
          first: The output of the first norm and activation.
          residual: The output of the residual function.
          drop_path: The probability that an example's residual function is dropped.
          train: True to drop at all.
        """
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
    """Two 3x3 convolutions, each after a norm and an activation.

    f(x) = 3x3(act(norm(3x3(act(norm(x))))))
    """

    last = 2

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], drop_path: Scalar, *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        """Returns the block's output."""
        spec, plan = self.spec, self.plan
        first = self.norm(name="norm1")(x, train=train)
        y = self.convolve(first, 1, 3, stride=plan.stride, dilation=plan.dilation[0])
        y = self.norm(name="norm2")(y, train=train)
        if spec.block_dropout:
            y = layers.Dropout(name="dropout")(y, spec.block_dropout, train=train)
        y = self.convolve(y, 2, 3, dilation=plan.dilation[1])
        return self.add(x, first, y, drop_path, train=train)


class PreactBottleneckBlock(PreactBlock):
    """1x1, 3x3 and 1x1 convolutions, each after a norm and an activation.

    f(x) = 1x1(act(norm(3x3(act(norm(1x1(act(norm(x)))))))))
    """

    last = 3

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], drop_path: Scalar, *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        """Returns the block's output."""
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
    """A bottleneck without norms: shortcut + alpha f(beta act(x)).

    Brock et al. 2021 (arXiv:2101.08692, section 3; arXiv:2102.06171, figure 6). The
    norms that `norm` makes here apply the activation only.
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
        """Returns the block's output."""
        spec, plan = self.spec, self.plan
        first_dilation, last_dilation = plan.dilation
        first = self.norm(name="norm1")(x, train=train) * beta
        y = self.convolve(first.astype(x.dtype), 1, 1)
        y = self.norm(name="norm2")(y, train=train)
        y = self.convolve(
            y, 2, 3, stride=plan.stride, dilation=first_dilation, groups=plan.groups
        )
        if spec.extra_conv:
            y = self.norm(name="norm2b")(y, train=train)
            y = self.convolve(
                y, 2, 3, dilation=last_dilation, groups=plan.groups, name="conv2b"
            )
        y = self.norm(name="norm3")(y, train=train)
        # Without a skip gain, this gain starts at zero, so that the block starts as its
        # shortcut.
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        y = self.convolve(y, 3, 1, gain_init=ones if spec.skip_gain else zeros)
        if spec.attention:
            # The gate halves its input on average, which the papers' factor undoes.
            y = 2 * self.attend(y)
        y = self.drop(y, drop_path, train=train)
        if spec.skip_gain:
            y = y * self.param("skip_gain", zeros, (), jnp.float32).astype(y.dtype)
        shortcut = self.shortcut(first if plan.project else x, train=train)
        return same_size(shortcut, y) + spec.alpha * y


def same_size(shortcut: jax.Array, residual: jax.Array) -> jax.Array:
    """Returns the shortcut; raises BadValueError if its shape is not the residual's."""
    if shortcut.shape != residual.shape:
        raise BadValueError(
            f"A shortcut has the shape {shortcut.shape[1:]} and its residual function"
            f" {residual.shape[1:]}. Use images whose sides are multiples of the"
            " product of the network's strides."
        )
    return shortcut


BLOCKS: dict[BlockName, type[Block]] = {
    "basic": BasicBlock,
    "bottleneck": BottleneckBlock,
    "preact_basic": PreactBasicBlock,
    "preact_bottleneck": PreactBottleneckBlock,
    "norm_free": NormFreeBlock,
}
