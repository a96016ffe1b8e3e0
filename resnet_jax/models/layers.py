"""Convolution and pooling with their geometry given as numbers."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# He et al. 2015 (arXiv:1502.01852), as torchvision draws it: normal, fan out.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Conv(nn.Module):
    """A square 2-D convolution without bias, padded by `(kernel - 1) // 2`.

    That is torch's usual `padding`; 'SAME' would shift stride-2 outputs by one pixel
    at even input sizes.

    Attributes:
      features: output channels.
      kernel: side of the kernel in pixels.
      stride: step in pixels along both sides.
      dtype: type of the computation; the kernel is kept in float32.
    """

    features: int
    kernel: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal_fan_out, shape, jnp.float32)
        pad = (self.kernel - 1) // 2
        return lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding=((pad, pad), (pad, pad)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Head(nn.Module):
    """A linear layer whose sums, bias and output are float32.

    Attributes:
      features: number of outputs.
      kernel_init: initialiser of the kernel [inputs, features].
      dtype: type of the factors of the product.
    """

    features: int
    kernel_init: Callable
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b f"]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
        product = jnp.dot(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return product + bias


def max_pool_3x3_stride_2(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """3x3/2 max pooling with one pixel of -inf around, as torchvision's stem."""
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def global_average_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b c"]:
    """Mean over height and width, summed in float32."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)


def pad_shortcut(
    x: Float[Array, "b h w c"], features: int, stride: int, where: str
) -> Float[Array, "b h2 w2 f"]:
    """Option A of He et al. 2015, section 4.2: subsample, and zeros as new channels.

    Args:
      x: the block's input.
      features: channels to reach; raises ValueError if `x` has more.
      stride: every how many pixels one is kept.
      where: `end` puts all zeros behind the channels, `both` half of them before.
    """
    missing = features - x.shape[-1]
    if missing < 0:
        raise ValueError(f"a pad shortcut cannot go from {x.shape[-1]} to {features}")
    before = missing // 2 if where == "both" else 0
    x = x[:, ::stride, ::stride, :]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, missing - before)))


def torch_linear_init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32):
    """torch.nn.Linear's default: uniform(-1, 1) / sqrt(inputs)."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
