"""Convolutions of square kernels: the dispatch to a platform's implementation.

The convolution is `lax.conv_general_dilated` on all platforms but CPUs, where
`kernels/cpu/conv.py` chooses a lowering for it and for each of its gradients.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.kernels import onednn, plain
from resnet_jax.kernels.arrays import Image, Kernel, Output, shape_like
from resnet_jax.kernels.cpu import conv as cpu_conv
from resnet_jax.kernels.geometry import Geometry, same_padding, symmetric_padding
from resnet_jax.kernels.platforms import (
    by_platform,
    is_plain,
    target_platform,
    traced_once,
)
from resnet_jax.parallel.sharding import match_varying_axes

__all__ = [
    "FusibleConvolution",
    "Geometry",
    "cast_kernel",
    "convolve",
    "same_padding",
    "symmetric_padding",
]


@flax.struct.dataclass
class FusibleConvolution:
    """A 1x1 convolution of stride 1 that the batch norm after it may compute.

    `kernels.norm.batch_norm` fuses the two where that is faster.

    Attributes:
      x: The images.
      kernel: The kernel, cast by `cast_kernel`.
    """

    x: Image
    kernel: Float[Array, "1 1 c f"]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The shape of the convolution's output."""
        b, h, w, _ = self.x.shape
        return b, h, w, self.kernel.shape[-1]

    def evaluate(self) -> Float[Array, "b h w f"]:
        """Computes the convolution by itself."""
        return convolve(self.x, self.kernel, Geometry())


def cast_kernel(kernel: Kernel, dtype: DTypeLike, groups: int = 1) -> Kernel:
    """Casts the kernel to the images' dtype, unless oneDNN rounds it itself.

    oneDNN reorders kernels anyway, and rounds them at the same time. `convolve`
    computes the same either way.

    Args:
      kernel: The float32 kernel.
      dtype: The dtype of the images.
      groups: Number of groups of channels.
    """
    on_cpu = target_platform.value in (None, "cpu") and not is_plain()
    if on_cpu and groups == 1 and onednn.rounds(dtype) and kernel.dtype == jnp.float32:
        return kernel
    return jnp.asarray(kernel, dtype)


def convolve(x: Image, kernel: Kernel, geometry: Geometry, groups: int = 1) -> Output:
    """Returns the convolution of `x` and `kernel`, of the dtype of `x`.

    `jax.grad` differentiates it, and both `jax.grad` and `jax.jvp` differentiate its
    gradients. `jax.jvp` does not differentiate the convolution itself, because that has
    a `jax.custom_vjp`, except inside of `plain_operations`.

    Args:
      x: The images.
      kernel: The kernel, of square windows, cast by `cast_kernel`.
      geometry: Stride, padding and dilation.
      groups: Number of groups of channels that do not see each other.
    """
    if is_plain():
        return plain.convolution(x, kernel.astype(x.dtype), geometry, groups)
    return _convolve(*match_varying_axes(x, kernel), geometry, groups, kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: Image, kernel: Kernel, geometry: Geometry, groups: int, kernel_dtype: DTypeLike
) -> Output:
    return _compute("forward", x, kernel, x.shape, len(kernel), geometry, groups)


def _convolve_forward(
    x: Image, kernel: Kernel, geometry: Geometry, groups: int, kernel_dtype: DTypeLike
) -> tuple[Output, tuple[Image, Kernel]]:
    # The forward pass and the gradient by the images need the kernel in this dtype.
    kernel = kernel.astype(x.dtype)
    y = _compute("forward", x, kernel, x.shape, len(kernel), geometry, groups)
    return y, (x, kernel)


def _convolve_backward(
    geometry: Geometry,
    groups: int,
    kernel_dtype: DTypeLike,
    saved: tuple[Image, Kernel],
    g: Output,
) -> tuple[Image, Kernel]:
    x, kernel = saved
    problem = x.shape, len(kernel), geometry, groups
    dx = _compute("input", g, kernel, *problem)
    return dx, _compute("kernel", x, g, *problem).astype(kernel_dtype)


_convolve.defvjp(_convolve_forward, _convolve_backward)


@functools.partial(traced_once, static_argnums=(0, 3, 4, 5, 6))
def _compute(
    direction: str,
    left: Array,
    right: Array,
    x_shape: tuple[int, ...],
    k: int,
    geometry: Geometry,
    groups: int,
) -> Array:
    """Computes a direction of a convolution; see `kernels.cpu.conv.compute`."""
    x = shape_like(left, x_shape)

    def by_xla(left, right):
        right = right.astype(left.dtype)
        if direction == "forward":
            return plain.convolution(left, right, geometry, groups)
        if direction == "input":
            return plain.convolution_input(left, right, geometry, x, groups)
        return plain.convolution_kernel(left, right, geometry, k, groups)

    def on_cpu(left, right):
        return cpu_conv.compute(direction, left, right, x, k, geometry, groups)

    lengths = [geometry.output_length(x_shape[1 + i], i, k) for i in range(2)]
    if 0 in (*lengths, *left.shape, *right.shape):
        # Empty arrays need no lowering of their own.
        return by_xla(left, right)
    return by_platform(left, right, cpu=on_cpu, default=by_xla)
