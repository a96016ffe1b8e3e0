"""The one residual network: stem, stages and head, built from a spec."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.models import layers
from resnet_jax.models.blocks import BLOCKS
from resnet_jax.models.norms import BatchNorm
from resnet_jax.models.spec import ResNetSpec


class ResNet(nn.Module):
    """A residual network (He et al. 2015, arXiv:1512.03385).

    Attributes:
      spec: what network it is.
      dtype: type of the computation. Parameters and statistics are float32.
      bn_group_size: examples that share batch-norm statistics in training; None: all.
    """

    spec: ResNetSpec
    dtype: DTypeLike = jnp.float32
    bn_group_size: int | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool = False
    ) -> Float[Array, "b classes"]:
        """Returns float32 logits of normalised images.

        In training mode the collection `batch_stats` must be mutable.
        """
        spec = self.spec
        if x.shape[-1] != spec.in_channels:
            raise ValueError(
                f"the network takes {spec.in_channels} channels, the images have"
                f" {x.shape[-1]}"
            )
        conv = functools.partial(layers.Conv, dtype=self.dtype)
        norm = functools.partial(
            BatchNorm,
            group_size=self.bn_group_size,
            epsilon=spec.norm_epsilon,
            momentum=spec.norm_momentum,
            unbiased=spec.norm_unbiased,
            dtype=self.dtype,
        )

        large = spec.stem == "imagenet"
        kernel, stride = (7, 2) if large else (3, 1)
        x = conv(spec.stem_width, kernel, stride, name="stem_conv")(x)
        x = nn.relu(norm(name="stem_norm")(x, train=train))
        if large:
            x = layers.max_pool_3x3_stride_2(x)

        block = BLOCKS[spec.block]
        for i, (size, width) in enumerate(
            zip(spec.stage_sizes, spec.widths, strict=True), 1
        ):
            for j in range(1, size + 1):
                stride = 2 if i > 1 and j == 1 else 1
                name = f"stage{i}_block{j}"
                x = block(spec, width, stride, conv, norm, name=name)(x, train=train)

        x = layers.global_average_pool(x)
        head_init = layers.torch_linear_init
        if spec.head_init_std is not None:
            head_init = nn.initializers.normal(spec.head_init_std)
        return layers.Head(spec.num_classes, head_init, self.dtype, name="head")(x)
