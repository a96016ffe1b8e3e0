"""Residual blocks: y = relu(shortcut(x) + f(x))."""

from collections.abc import Callable

import flax.linen as nn
from jaxtyping import Array, Float

from resnet_jax.models.layers import pad_shortcut
from resnet_jax.models.spec import ResNetSpec


class Shortcut(nn.Module):
    """What a block adds to f(x): x itself, or x brought to f(x)'s shape.

    He et al. 2015 (arXiv:1512.03385), section 3.3, options A and B.
    """

    spec: ResNetSpec
    features: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        if self.stride == 1 and x.shape[-1] == self.features:
            return x
        if self.spec.shortcut == "pad":
            return pad_shortcut(x, self.features, self.stride, self.spec.pad_channels)
        x = self.conv(self.features, 1, self.stride, name="conv")(x)
        return self.norm(name="norm")(x, train=train)


class BasicBlock(nn.Module):
    """f = norm(3x3(relu(norm(3x3(x))))); He et al. 2015, figure 5 left."""

    spec: ResNetSpec
    width: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    expansion = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        shortcut = Shortcut(
            self.spec, self.width, self.stride, self.conv, self.norm, name="shortcut"
        )(x, train=train)
        x = self.conv(self.width, 3, self.stride, name="conv1")(x)
        x = nn.relu(self.norm(name="norm1")(x, train=train))
        x = self.conv(self.width, 3, name="conv2")(x)
        x = self.norm(scale_init=last_scale(self.spec), name="norm2")(x, train=train)
        return nn.relu(shortcut + x)


class BottleneckBlock(nn.Module):
    """f = norm(1x1(relu(norm(3x3(relu(norm(1x1(x)))))); He et al. 2015, figure 5."""

    spec: ResNetSpec
    width: int
    stride: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    expansion = 4

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h2 w2 f"]:
        features = self.width * self.expansion
        shortcut = Shortcut(
            self.spec, features, self.stride, self.conv, self.norm, name="shortcut"
        )(x, train=train)
        on_1x1 = self.spec.stride_at == "1x1"
        stride_1x1, stride_3x3 = (self.stride, 1) if on_1x1 else (1, self.stride)
        x = self.conv(self.width, 1, stride_1x1, name="conv1")(x)
        x = nn.relu(self.norm(name="norm1")(x, train=train))
        x = self.conv(self.width, 3, stride_3x3, name="conv2")(x)
        x = nn.relu(self.norm(name="norm2")(x, train=train))
        x = self.conv(features, 1, name="conv3")(x)
        x = self.norm(scale_init=last_scale(self.spec), name="norm3")(x, train=train)
        return nn.relu(shortcut + x)


def last_scale(spec: ResNetSpec) -> nn.initializers.Initializer:
    """Initialiser of the scale of a block's last batch norm."""
    return nn.initializers.zeros if spec.zero_init_last else nn.initializers.ones


BLOCKS = {"basic": BasicBlock, "bottleneck": BottleneckBlock}
