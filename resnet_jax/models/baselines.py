"""The baselines that residual networks are compared with: VGG and Highway networks.

The third baseline, plain networks, are `ResNetSpec`s with `shortcut="none"`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.errors import BadValueError
from resnet_jax.models import layers
from resnet_jax.models.norms import BatchNorm
from resnet_jax.models.spec import check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class VGGSpec:
    """A VGG network (Simonyan & Zisserman 2014, arXiv:1409.1556), as in torchvision.

    Attributes:
      stage_sizes: The number of 3x3 convolutions before each max pooling.
      widths: The channels of each stage's convolutions.
      batch_norm: True if batch norm follows each convolution.
      hidden: The features of the two hidden linear layers.
      pooled: The side in pixels to which the last output is averaged before them.
      dropout: The probability that a feature after a hidden layer is dropped.
      num_classes: The number of logits. 0: the last hidden layer is the output.
      in_channels: The channels of the input.
    """

    stage_sizes: tuple[int, ...] = (2, 2, 4, 4, 4)
    widths: tuple[int, ...] = (64, 128, 256, 512, 512)
    batch_norm: bool = False
    hidden: int = 4096
    pooled: int = 7
    dropout: float = 0.5
    num_classes: int = 1000
    in_channels: int = 3

    def __post_init__(self):
        check_fields(self)
        if not 0 < len(self.stage_sizes) == len(self.widths):
            raise BadValueError(
                f"widths {self.widths} must have one entry for each of stage_sizes"
                f" {self.stage_sizes}, of which there is at least one."
            )

    @property
    def for_small_images(self) -> bool:
        """Tells whether the network is for images as small as CIFAR's."""
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class HighwaySpec:
    """A convolutional Highway network (Srivastava et al. 2015, arXiv:1507.06228).

    A layer that keeps its width is y = T(x) relu(C(x)) + (1 - T(x)) x, in which C is a
    convolution and the gate T is the sigmoid of another one. A layer that changes the
    width is a plain convolution. 2x2 max pooling follows each stage but the last,
    which the mean over pixels follows (section 4.2, for networks without fully
    connected layers).

    Attributes:
      widths: The channels of every layer of every stage.
      gate_bias: The initial value of the gates' biases. Below 0 a layer starts close to
        the identity (section 2.2).
      num_classes: The number of logits. 0: the pooled features are the output.
      in_channels: The channels of the input.
    """

    widths: tuple[tuple[int, ...], ...]
    gate_bias: float = -1.0
    num_classes: int = 10
    in_channels: int = 3

    def __post_init__(self):
        check_fields(self)
        if not self.widths or not all(self.widths):
            raise BadValueError(
                f"widths {self.widths} must have at least one stage, and each stage at"
                " least one layer."
            )

    @property
    def for_small_images(self) -> bool:
        """Tells whether the network is for images as small as CIFAR's."""
        return True


class VGG(nn.Module):
    """The network of a `VGGSpec`.

    Attributes:
      spec: The network as data.
      dtype: The type of the computation. Parameters and statistics are float32.
      bn_group_size: The ghost batch size in examples. None: the whole batch.
    """

    spec: VGGSpec
    dtype: DTypeLike = jnp.float32
    bn_group_size: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        *,
        train: bool = False,
        features: bool = False,
    ) -> Float[Array, "b f"] | dict[str, Float[Array, "b _ _ _"]]:
        """Returns float32 logits of normalised images.

        Args:
          x: The images.
          train: Turns on dropout, and batch norm by the batch's statistics.
          features: Returns the outputs of the stages, `C1`, `C2` and so on, instead.
        """
        spec = self.spec
        outputs = {}
        for i, (size, width) in enumerate(
            zip(spec.stage_sizes, spec.widths, strict=True), 1
        ):
            for j in range(1, size + 1):
                conv = layers.Conv(
                    width, 3, bias=True, dtype=self.dtype, name=f"stage{i}_conv{j}"
                )
                x = conv(x)
                if spec.batch_norm:
                    norm = BatchNorm(
                        self.bn_group_size, dtype=self.dtype, name=f"stage{i}_norm{j}"
                    )
                    x = norm(x, train=train)
                x = nn.relu(x)
            outputs[f"C{i}"] = x
            x = nn.max_pool(x, (2, 2), (2, 2))
        if features:
            return outputs
        # torch's weights expect the order channel, row, column.
        x = average_to(x, spec.pooled).transpose(0, 3, 1, 2)
        x = x.reshape(x.shape[0], -1)
        for i in (1, 2):
            init = nn.initializers.normal(0.01)
            x = layers.Head(spec.hidden, init, self.dtype, name=f"hidden{i}")(x)
            x = nn.relu(x)
            x = layers.Dropout(name=f"dropout{i}")(x, spec.dropout, train=train)
        if not spec.num_classes:
            return x
        init = nn.initializers.normal(0.01)
        return layers.Head(spec.num_classes, init, self.dtype, name="head")(x)


def average_to(x: Float[Array, "b h w c"], side: int) -> Float[Array, "b s s c"]:
    """Averages an image to `side` x `side` pixels, as torch's AdaptiveAvgPool2d does.

    Along an axis of n pixels, output k is the mean over the pixels floor(k n / side) up
    to, but not including, ceil((k + 1) n / side). So these ranges overlap if `side`
    does not divide n, and repeat if n is smaller.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        parts = [
            jnp.take(
                x, jnp.arange(k * n // side, -(-(k + 1) * n // side)), axis=axis
            ).mean(axis=axis, dtype=jnp.float32)
            for k in range(side)
        ]
        x = jnp.stack(parts, axis=axis).astype(x.dtype)
    return x


class Highway(nn.Module):
    """The network of a `HighwaySpec`.

    Attributes:
      spec: The network as data.
      dtype: The type of the computation. Parameters are float32.
      bn_group_size: The ghost batch size in examples, inside which training mixes
        images. The network itself has no batch norm.
    """

    spec: HighwaySpec
    dtype: DTypeLike = jnp.float32
    bn_group_size: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        *,
        train: bool = False,
        features: bool = False,
    ) -> Float[Array, "b f"] | dict[str, Float[Array, "b _ _ _"]]:
        """Returns float32 logits of normalised images.

        Args:
          x: The images.
          train: Has no effect; the network computes the same in training.
          features: Returns the outputs of the stages, `C1`, `C2` and so on, instead.
        """
        outputs = {}
        for i, widths in enumerate(self.spec.widths, 1):
            if i > 1:
                x = nn.max_pool(x, (2, 2), (2, 2))
            for j, width in enumerate(widths, 1):
                layer = HighwayLayer(
                    width, self.spec.gate_bias, self.dtype, name=f"stage{i}_layer{j}"
                )
                x = layer(x)
            outputs[f"C{i}"] = x
        if features:
            return outputs
        x = layers.global_average_pool(x)
        if not self.spec.num_classes:
            return x.astype(jnp.float32)
        init = layers.torch_linear_init
        return layers.Head(self.spec.num_classes, init, self.dtype, name="head")(x)


class HighwayLayer(nn.Module):
    """Computes T(x) relu(C(x)) + (1 - T(x)) x, or relu(C(x)) if the width changes.

    Attributes:
      features: The channels of the output.
      gate_bias: The initial value of the gate's bias.
      dtype: The type of the computation.
    """

    features: int
    gate_bias: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w f"]:
        """Returns the layer's output."""

        def conv(name: str, bias_init: nn.initializers.Initializer) -> jax.Array:
            return layers.Conv(
                self.features,
                3,
                bias=True,
                bias_init=bias_init,
                dtype=self.dtype,
                name=name,
            )(x)

        y = nn.relu(conv("conv", nn.initializers.zeros))
        if x.shape[-1] != self.features:
            return y
        gate = nn.sigmoid(conv("gate", nn.initializers.constant(self.gate_bias)))
        return gate * y + (1 - gate) * x
