"""Convolution, batch norm and max pooling by XLA's operations, without own kernels.

All platforms but CPUs always use this convolution and pooling. Inside of
`plain_operations` every platform uses all three.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from resnet_jax.kernels.arrays import Image, Kernel, Output, Shape, shape_like
from resnet_jax.kernels.geometry import Geometry
from resnet_jax.kernels.norm_options import GhostBatchNorm


def convolution(
    x: Image, kernel: Kernel, geometry: Geometry, groups: int = 1
) -> Output:
    """Returns XLA's convolution of images and a kernel of one dtype.

    Args:
      x: The images.
      kernel: The kernel, of square windows.
      geometry: Stride, padding and dilation.
      groups: Number of groups of channels that do not see each other.
    """
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(geometry.stride, geometry.stride),
        padding=geometry.padding,
        rhs_dilation=(geometry.dilation, geometry.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def convolution_input(
    g: Output, kernel: Kernel, geometry: Geometry, like: Shape, groups: int = 1
) -> Image:
    """Returns the gradient of `convolution` with respect to `x`.

    Args:
      g: The gradient with respect to the output.
      kernel: The kernel.
      geometry: Stride, padding and dilation.
      like: Shape and dtype of the images.
      groups: Number of groups of channels.
    """
    forward = functools.partial(convolution, geometry=geometry, groups=groups)
    (dx,) = jax.linear_transpose(lambda x: forward(x, kernel), like)(g)
    return dx


def convolution_kernel(
    x: Image, g: Output, geometry: Geometry, side: int, groups: int = 1
) -> Kernel:
    """Returns the gradient of `convolution` with respect to the kernel.

    Args:
      x: The images.
      g: The gradient with respect to the output.
      geometry: Stride, padding and dilation.
      side: The side of the kernel in pixels.
      groups: Number of groups of channels.
    """
    like = shape_like(x, (side, side, x.shape[-1] // groups, g.shape[-1]))
    forward = functools.partial(convolution, geometry=geometry, groups=groups)
    (dkernel,) = jax.linear_transpose(lambda kernel: forward(x, kernel), like)(g)
    return dkernel


def batch_norm(
    x: Image,
    scale: Float[Array, "c"],
    bias: Float[Array, "c"],
    norm: GhostBatchNorm,
    pool: Callable | None = None,
) -> tuple[Output, Float[Array, "g c"], Float[Array, "g c"]]:
    """Normalises each ghost batch by its own statistics, then activates and pools.

    Args:
      x: The batch.
      scale: The factor of each channel.
      bias: The summand of each channel.
      norm: The ghost batches' size, epsilon, activation and output dtype.
      pool: A max pooling of the output, or None.

    Returns:
      The output, and the means and variances of the ghost batches in float32.
    """
    b, h, w, c = x.shape
    batches = x.reshape(b // norm.size, norm.size, h, w, c).astype(jnp.float32)
    mean = batches.mean(axis=(1, 2, 3), keepdims=True)
    deviation = batches - mean
    var = jnp.square(deviation).mean(axis=(1, 2, 3), keepdims=True)
    out = deviation / jnp.sqrt(var + norm.epsilon) * scale + bias
    out = norm.activate(out.reshape(x.shape))
    return (
        pool(out) if pool else out,
        mean.reshape(-1, c),
        var.reshape(-1, c),
    )


def max_pool(x: Image, side: int, geometry: Geometry) -> Output:
    """Returns the maximum of each window of side x side; the padding is -inf.

    Args:
      x: The images.
      side: The side of the window in pixels.
      geometry: Stride and padding; a dilation is ignored.
    """
    strides = (geometry.stride, geometry.stride)
    return nn.max_pool(x, (side, side), strides, geometry.padding)
