"""Convolutions on CPUs as matrix products, where XLA's own convolution is slower.

`convolve` is `lax.conv_general_dilated` on every other platform. On CPUs the forward
pass and the gradients by input and kernel each take one of the forms of
`kernels/cpu/conv.py`.
Convolutions of groups are a batch of products, each of some of the groups.
"""

import functools
import os

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from resnet_jax.kernels import onednn
from resnet_jax.kernels.cpu.conv import (
    Geometry,
    Image,
    Kernel,
    Output,
    Shape,
    apply,
    convolution,
    like_of,
    unfused,
)
from resnet_jax.kernels.platforms import by_platform, known, traced_once
from resnet_jax.parallel.sharding import match_varying_axes

# The choice.


def form_of(
    direction: str,
    b: int,
    size: int,
    c: int,
    k: int,
    where: Geometry,
    dtype: DTypeLike,
) -> str:
    """The form that is fastest, by `python -m resnet_jax.bench convolutions`.

    It is another one where XLA leaves bfloat16 to oneDNN (`xla_has_onednn`), or this
    program does (`onednn.computes`).

    Args:
      direction: `forward`, `input` or `kernel`: what is computed.
      b: number of images.
      size: height of the output.
      c: channels of the input.
      k: side of the kernel.
      where: stride, padding and dilation.
      dtype: of the image.
    """
    strided, dilated = where.stride > 1, where.dilation > 1
    half = jnp.dtype(dtype) == jnp.bfloat16
    amx = half and onednn.has_amx()
    # Of few pixels, bringing the kernel into oneDNN's order costs more than is gained.
    always = amx if direction == "forward" else direction == "input" and strided
    least = 4000 if half and not (amx or onednn.widens()) else onednn.MANY
    enough = always or b * size**2 >= least
    if (k > 1 or amx) and enough and onednn.computes(dtype):
        return "onednn"
    if half and xla_has_onednn():
        if direction == "forward":
            # Of so few pixels a call costs more than the product.
            if k == 1:
                return "product" if b * size**2 <= 200 else "convolution"
            return "patches" if b * size**2 <= 100 else "convolution"
        if direction == "kernel" and k > 1 and c <= 32:
            return "convolution"
        if direction == "input" and not strided and (k > 1 or size > 7):
            return "turned"
    if k == 1:
        return "product"
    if direction == "kernel":
        if strided:
            return "rows" if c < 8 and not dilated else "patches"
        if c <= 16 or (not half and c <= 64 and size <= 32):
            return "convolution"
        return "cross" if size > 14 else "patches"
    # So few channels side by side are slow to gather.
    if c < 8:
        return "convolution"
    if strided and direction == "input":
        return "folded" if (half or c <= 16) and not dilated else "convolution"
    if size <= 7:
        return "patches"
    if half:
        return "patches" if strided else "cross"
    # XLA's convolution gains on the products with the number of outputs.
    return "patches" if size <= 14 and b * size**2 <= 1000 else "convolution"


@functools.cache
def xla_has_onednn() -> bool:
    """Whether XLA leaves bfloat16 convolutions on CPUs to oneDNN.

    With `XLA_FLAGS=--xla_cpu_experimental_onednn_custom_call=true` jax 0.12 does, where
    the CPU has instructions for bfloat16.
    """
    if "onednn" not in os.environ.get("XLA_FLAGS", ""):
        return False
    try:
        cpu, *_ = jax.local_devices(backend="cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves CPUs out.
        return False
    x, kernel = (Shape(s, jnp.bfloat16) for s in ((1, 8, 8, 16), (1, 1, 16, 16)))
    with jax.default_device(cpu):
        found = jax.jit(convolution, static_argnums=2).lower(x, kernel, Geometry())
    return "onednn$convolution" in found.compile().as_text()


# Groups.

# XLA takes hundreds of times as long for the gradient by a kernel of groups, and some
# times as long for the rest; wider blocks multiply more zeros.
_BLOCK = 32


def blocks_of(channels: int, groups: int) -> int:
    """How many blocks of whole groups: as many as have 32 channels each, or one."""
    counts = (n for n in range(groups, 0, -1) if groups % n == 0)
    return next((n for n in counts if channels // n >= _BLOCK), 1)


def _in_blocks(direction: str, one, other, x: Shape, k: int, where: Geometry, groups):
    """A direction of a convolution of groups, as a batch of blocks of them.

    A block's kernel is zero between its groups.
    """
    n = blocks_of(x.shape[3], groups)
    x = x.update(shape=(*x.shape[:3], x.shape[3] // n))
    form = _batched_form(direction, k, where)
    block = functools.partial(apply, direction, form, x=x, k=k, where=where)
    if direction == "kernel":
        kernels = jax.vmap(block)(_apart(one, n), _apart(other, n))
        return _diagonal(kernels, groups)
    return _together(jax.vmap(block)(_apart(one, n), _dense(other, n, groups)))


def _batched_form(direction: str, k: int, where: Geometry) -> str:
    """The form that is fastest as one product of all blocks."""
    if k == 1:
        return "product"
    if where.stride == 1:
        return "cross"
    if direction == "input":
        return "folded" if where.dilation == 1 else "convolution"
    return "patches"


def _apart(x: Image, n: int) -> Float[Array, "n b h w c2"]:
    b, h, w, c = x.shape
    return x.reshape(b, h, w, n, c // n).transpose(3, 0, 1, 2, 4)


def _together(blocks: Float[Array, "n b h w c"]) -> Float[Array, "b h w c2"]:
    n, b, h, w, c = blocks.shape
    return blocks.transpose(1, 2, 3, 0, 4).reshape(b, h, w, n * c)


def _dense(kernel: Kernel, n: int, groups: int) -> Float[Array, "n k k c f2"]:
    """A kernel of groups as those of n blocks without groups."""
    k, _, c, f = kernel.shape
    m = groups // n
    kernel = kernel.reshape(k, k, 1, c, n, m, f // groups)
    same = jnp.eye(m, dtype=bool)[:, None, None, :, None]
    kernel = jnp.where(same, kernel, jnp.zeros((), kernel.dtype))
    return kernel.transpose(4, 0, 1, 2, 3, 5, 6).reshape(n, k, k, m * c, f // n)


def _diagonal(
    kernels: Float[Array, "n k k c f2"], groups: int
) -> Float[Array, "k k i f"]:
    """The transpose of `_dense`."""
    n, k, _, c, f = kernels.shape
    m = groups // n
    kernels = kernels.reshape(n, k, k, m, c // m, m, f // m)
    own = jnp.diagonal(kernels, axis1=3, axis2=5)
    return own.transpose(1, 2, 3, 0, 5, 4).reshape(k, k, c // m, n * f)


# The convolution.


def as_taken(kernel: Kernel, dtype: DTypeLike, groups: int = 1) -> Kernel:
    """A kernel as `convolve` takes it, with images of a type: of the same type.

    Where it is rounded anyway when it is brought into oneDNN's order, it is left as it
    is; `convolve` computes the same of it.
    """
    rounded = known.value in (None, "cpu") and groups == 1 and onednn.rounds(dtype)
    if rounded and kernel.dtype == jnp.float32:
        return kernel
    return jnp.asarray(kernel, dtype)


def convolve(
    x: Image, kernel: Kernel, where: Geometry, groups: int = 1
) -> Float[Array, "b h2 w2 f"]:
    """The convolution of `x` and `kernel`, of `x.dtype`; both are `as_taken`.

    It has gradients, and derivatives of these in both modes, but as for all functions
    with gradients of their own, `jax.jvp` does not take its first one.

    Args:
      x: images.
      kernel: of square windows.
      where: stride, padding and dilation.
      groups: of channels that do not see each other.
    """
    return _convolve(*match_varying_axes(x, kernel), where, groups, kernel.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: Image, kernel: Kernel, where: Geometry, groups: int, of_kernel: DTypeLike
) -> Output:
    return _direction("forward", x, kernel, x.shape, len(kernel), where, groups)


def _convolve_forward(x, kernel, where: Geometry, groups: int, of_kernel: DTypeLike):
    # Both directions need it of that type.
    kernel = kernel.astype(x.dtype)
    y = _direction("forward", x, kernel, x.shape, len(kernel), where, groups)
    return y, (x, kernel)


def _convolve_backward(
    where: Geometry, groups: int, of_kernel: DTypeLike, saved, g: Output
):
    x, kernel = saved
    given = x.shape, len(kernel), where, groups
    dx = _direction("input", g, kernel, *given)
    return dx, _direction("kernel", x, g, *given).astype(of_kernel)


_convolve.defvjp(_convolve_forward, _convolve_backward)


@functools.partial(traced_once, static_argnums=(0, 3, 4, 5, 6))
def _direction(
    direction: str, one, other, x_shape, k: int, where: Geometry, groups: int
):
    x = like_of(one, x_shape)
    given = {"x": x, "k": k, "where": where}

    def xla(one, other):
        other = other.astype(one.dtype)
        return apply(direction, "convolution", one, other, **given, groups=groups)

    sides = [where.output(x.shape[1 + side], side, k) for side in range(2)]
    if 0 in (*sides, *one.shape, *other.shape):
        # There is nothing to compute.
        return xla(one, other)
    cpu = functools.partial(_directly, direction, **given)
    if groups > 1:
        cpu = functools.partial(_in_blocks, direction, **given, groups=groups)
    return by_platform(one, other, cpu=cpu, default=xla)


def _directly(direction: str, one, other, x: Shape, k: int, where: Geometry):
    """A direction of a convolution without groups, of an image like `x`."""
    b, height, _, c = x.shape
    size = where.output(height, 0, k)
    form = form_of(direction, b, size, c, k, where, x.dtype)
    if form != "onednn":
        other = other.astype(one.dtype)
    if (direction, form) == ("kernel", "convolution"):
        # XLA transposes both.
        one, other = unfused(one), unfused(other)
    return apply(direction, form, one, other, x, k, where)
