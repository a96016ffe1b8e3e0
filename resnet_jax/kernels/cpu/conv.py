"""Convolutions on CPUs: the choice of the lowering, and grouped convolutions.

Many convolutions are faster on CPUs as matrix products than as XLA's convolution. The
forward pass and the gradients with respect to images and kernel are chosen one by one.
A grouped convolution is computed as a batch of convolutions of some groups each.
"""

import functools
import os

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.kernels import onednn, plain
from resnet_jax.kernels.arrays import Image, Kernel, Shape
from resnet_jax.kernels.cpu.lowerings import lower
from resnet_jax.kernels.cpu.windows import fusion_barrier
from resnet_jax.kernels.geometry import Geometry

# XLA's gradient with respect to a grouped kernel takes hundreds of times as long as
# that of an ungrouped one, and its other directions some times as long. Blocks of
# groups with fewer channels would make small products, those with more would multiply
# more zeros.
_CHANNELS_PER_BLOCK = 32


def compute(
    direction: str,
    left: Array,
    right: Array,
    x: Shape,
    k: int,
    geometry: Geometry,
    groups: int = 1,
) -> Array:
    """Computes a direction of a convolution by the fastest lowering.

    Args:
      direction: `forward`, or `input` or `kernel` for the gradient with respect to it.
      left: The images, or for `input` the output's gradient.
      right: The kernel, or for `kernel` the output's gradient.
      x: Shape and dtype of the images.
      k: The side of the kernel in pixels.
      geometry: Stride, padding and dilation.
      groups: Number of groups of channels that do not see each other.
    """
    if groups > 1:
        return _in_blocks(direction, left, right, x, k, geometry, groups)
    b, height, _, c = x.shape
    size = geometry.output_length(height, 0, k)
    lowering = choose_lowering(direction, b, size, c, k, geometry, x.dtype)
    if lowering != "onednn":
        right = right.astype(left.dtype)
    if (direction, lowering) == ("kernel", "convolution"):
        # XLA transposes both operands.
        left, right = fusion_barrier(left), fusion_barrier(right)
    return lower(direction, lowering, left, right, x, k, geometry)


def choose_lowering(
    direction: str,
    b: int,
    size: int,
    c: int,
    k: int,
    geometry: Geometry,
    dtype: DTypeLike,
) -> str:
    """Chooses the fastest lowering by `python -m resnet_jax.bench convolutions`.

    The choice differs where XLA leaves bfloat16 to oneDNN (`xla_uses_onednn`), and
    where this package does (`onednn.computes`).

    Args:
      direction: `forward`, `input` or `kernel`.
      b: The number of images.
      size: The height of the output in pixels.
      c: The channels of the input.
      k: The side of the kernel in pixels.
      geometry: Stride, padding and dilation.
      dtype: The dtype of the images.
    """
    strided, dilated = geometry.stride > 1, geometry.dilation > 1
    half = jnp.dtype(dtype) == jnp.bfloat16
    amx = half and onednn.has_amx()
    # With few pixels, reordering the kernel for oneDNN costs more than oneDNN gains.
    always = amx if direction == "forward" else direction == "input" and strided
    least = 4000 if half and not (amx or onednn.widens()) else onednn.MANY_PIXELS
    enough = always or b * size**2 >= least
    if (k > 1 or amx) and enough and onednn.computes(dtype):
        return "onednn"
    if half and xla_uses_onednn():
        if direction == "forward":
            # With so few pixels, a call of oneDNN costs more than the product.
            if k == 1:
                return "matmul" if b * size**2 <= 200 else "convolution"
            return "im2col" if b * size**2 <= 100 else "convolution"
        if direction == "kernel" and k > 1 and c <= 32:
            return "convolution"
        if direction == "input" and not strided and (k > 1 or size > 7):
            return "flipped_kernel"
    if k == 1:
        return "matmul"
    if direction == "kernel":
        if strided:
            return "width_to_depth" if c < 8 and not dilated else "im2col"
        if c <= 16 or (not half and c <= 64 and size <= 32):
            return "convolution"
        return "row_im2col" if size > 14 else "im2col"
    # So few channels are slow to gather side by side.
    if c < 8:
        return "convolution"
    if strided and direction == "input":
        fast = (half or c <= 16) and not dilated
        return "space_to_depth" if fast else "convolution"
    if size <= 7:
        return "im2col"
    if half:
        return "im2col" if strided else "row_im2col"
    # The more outputs there are, the faster XLA's convolution is beside the products.
    return "im2col" if size <= 14 and b * size**2 <= 1000 else "convolution"


@functools.cache
def xla_uses_onednn() -> bool:
    """Returns whether XLA leaves bfloat16 convolutions on CPUs to oneDNN.

    It does in jax 0.12 with `XLA_FLAGS=--xla_cpu_experimental_onednn_custom_call=true`,
    where the CPU has instructions for bfloat16.
    """
    if "onednn" not in os.environ.get("XLA_FLAGS", ""):
        return False
    try:
        cpu, *_ = jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves CPUs out.
        return False
    x, kernel = (Shape(s, jnp.bfloat16) for s in ((1, 8, 8, 16), (1, 1, 16, 16)))
    convolution = jax.jit(plain.convolution, static_argnums=2)
    with jax.default_device(cpu):
        compiled = convolution.lower(x, kernel, Geometry()).compile()
    return "onednn$convolution" in (compiled.as_text() or "")


def blocks_of_groups(channels: int, groups: int) -> int:
    """Returns the number of blocks into which a convolution's groups are divided.

    It is the largest number of equal blocks that have at least 32 input channels each,
    or 1.
    """
    counts = (n for n in range(groups, 0, -1) if groups % n == 0)
    return next((n for n in counts if channels // n >= _CHANNELS_PER_BLOCK), 1)


def _in_blocks(
    direction: str,
    left: Array,
    right: Array,
    x: Shape,
    k: int,
    geometry: Geometry,
    groups: int,
) -> Array:
    """Computes a direction of a grouped convolution as a batch of blocks of groups.

    A block is a convolution without groups. Its kernel is zero between its groups.
    """
    n = blocks_of_groups(x.shape[3], groups)
    x = x.update(shape=(*x.shape[:3], x.shape[3] // n))
    lowering = _batched_lowering(direction, k, geometry)
    block = functools.partial(lower, direction, lowering, x=x, k=k, geometry=geometry)
    if direction == "kernel":
        kernels = jax.vmap(block)(_split(left, n), _split(right, n))
        return _grouped_kernel(kernels, groups)
    return _join(jax.vmap(block)(_split(left, n), _block_kernels(right, n, groups)))


def _batched_lowering(direction: str, k: int, geometry: Geometry) -> str:
    """Chooses the lowering that is fastest as one batched product of all blocks."""
    if k == 1:
        return "matmul"
    if geometry.stride == 1:
        return "row_im2col"
    if direction == "input":
        return "space_to_depth" if geometry.dilation == 1 else "convolution"
    return "im2col"


def _split(x: Image, n: int) -> Float[Array, "n b h w c2"]:
    b, h, w, c = x.shape
    return x.reshape(b, h, w, n, c // n).transpose(3, 0, 1, 2, 4)


def _join(blocks: Float[Array, "n b h w c"]) -> Float[Array, "b h w c2"]:
    n, b, h, w, c = blocks.shape
    return blocks.transpose(1, 2, 3, 0, 4).reshape(b, h, w, n * c)


def _block_kernels(kernel: Kernel, n: int, groups: int) -> Float[Array, "n k k c f2"]:
    """Returns the kernels of n blocks without groups for a grouped kernel."""
    k, _, c, f = kernel.shape
    m = groups // n
    kernel = kernel.reshape(k, k, 1, c, n, m, f // groups)
    same = jnp.eye(m, dtype=bool)[:, None, None, :, None]
    kernel = jnp.where(same, kernel, jnp.zeros((), kernel.dtype))
    return kernel.transpose(4, 0, 1, 2, 3, 5, 6).reshape(n, k, k, m * c, f // n)


def _grouped_kernel(
    kernels: Float[Array, "n k k c f2"], groups: int
) -> Float[Array, "k k i f"]:
    """Computes the transpose of `_block_kernels`."""
    n, k, _, c, f = kernels.shape
    m = groups // n
    kernels = kernels.reshape(n, k, k, m, c // m, m, f // m)
    own = jnp.diagonal(kernels, axis1=3, axis2=5)
    return own.transpose(1, 2, 3, 0, 5, 4).reshape(k, k, c // m, n * f)
