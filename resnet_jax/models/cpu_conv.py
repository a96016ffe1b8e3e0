"""Convolutions on CPUs as matrix products, where XLA's own convolution is slower.

`convolve` is `lax.conv_general_dilated` on every other platform. On CPUs the forward
pass and the gradients by input and kernel each take one of these forms:

convolution: XLA's.
product: a 1x1 kernel is one product, of the pixels that it sees.
patches: one product with the k*k pixels that each output sees laid side by side.
cross: of stride 1: one product of pixels of a row laid side by side with all rows of
    the kernel, which are then added.
rows, folded: `patches` of a strided convolution seen as one of stride 1, in which
    stride pixels of a row, or of stride rows, are one with as many times the channels.
turned: of stride 1: XLA's, of the gradient with the kernel turned.

Convolutions of groups are a batch of such products, each of some of the groups.

`python -m resnet_jax.bench convolutions` measures them side by side.
"""

import dataclasses
import functools
import math
import os

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Image = Float[Array, "b h w c"]
Kernel = Float[Array, "k k i f"]
Output = Float[Array, "b h2 w2 f"]
Other = Float[Array, "b _ _ _"]
Shape = jax.ShapeDtypeStruct
Padding = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where a convolution's outputs lie.

    Attributes:
      stride: step in pixels along both sides.
      padding: pixels of zeros before and behind, along height and width.
      dilation: distance in pixels between two taps.
    """

    stride: int = 1
    padding: Padding = ((0, 0), (0, 0))
    dilation: int = 1

    def output(self, size: int, side: int, kernel: int) -> int:
        """Length of the output along a side: 0 is the height, 1 the width."""
        span = self.dilation * (kernel - 1) + 1
        return (size + sum(self.padding[side]) - span) // self.stride + 1


# Forms.


def convolution(x: Image, kernel: Kernel, where: Geometry, groups: int = 1) -> Output:
    """XLA's convolution."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(where.stride, where.stride),
        padding=where.padding,
        rhs_dilation=(where.dilation, where.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def product(x: Image, kernel: Kernel, where: Geometry) -> Output:
    """A 1x1 kernel applied to the pixels that it sees."""
    return _dot(taps(x, kernel.shape[0], where)[0], kernel[0, 0])


def product_input(g: Output, kernel: Kernel, where: Geometry, like: Shape) -> Image:
    """The gradient of `product` by `x`, whose shape is that of `like`."""
    return _spread(_dot_transposed(g, kernel[0, 0]), like, where)


def product_kernel(x: Image, g: Output, where: Geometry, k: int) -> Kernel:
    """The gradient of `product` by the kernel."""
    (seen,) = taps(x, k, where)
    return _outer(seen, g)[None, None]


def patches(x: Image, kernel: Kernel, where: Geometry) -> Output:
    """All pixels that an output sees, side by side, times the kernel."""
    f = kernel.shape[-1]
    side_by_side = lax.concatenate(taps(x, kernel.shape[0], where), 3)
    return _dot(side_by_side, kernel.reshape(-1, f))


def patches_input(g: Output, kernel: Kernel, where: Geometry, like: Shape) -> Image:
    """The gradient of a convolution of stride 1 by `x`: one with the kernel turned."""
    return patches(g, *_turned(kernel, where))


def patches_kernel(x: Image, g: Output, where: Geometry, k: int) -> Kernel:
    """The gradient of `patches` by the kernel."""
    side_by_side = lax.concatenate(taps(x, k, where), 3)
    return _outer(side_by_side, g).reshape(k, k, x.shape[-1], g.shape[-1])


def cross(x: Image, kernel: Kernel, where: Geometry) -> Output:
    """Of stride 1: the k pixels of a row side by side times all rows of the kernel."""
    k, _, c, f = kernel.shape
    side_by_side = _columns(x, k, where)
    by_row = kernel.transpose(1, 2, 0, 3).reshape(k * c, k * f)
    summed = of_sums(x.dtype)
    product = _dot(side_by_side, by_row, summed)
    h, d = where.output(x.shape[1], 0, k), where.dilation
    rows = [
        product[:, i * d : i * d + h, :, i * f : (i + 1) * f].astype(summed)
        for i in range(k)
    ]
    return functools.reduce(jnp.add, rows).astype(x.dtype)


def cross_input(g: Output, kernel: Kernel, where: Geometry, like: Shape) -> Image:
    """The gradient of `cross` by `x`."""
    return cross(g, *_turned(kernel, where))


def cross_kernel(x: Image, g: Output, where: Geometry, k: int) -> Kernel:
    """The gradient of `cross` by the kernel."""
    c, f, d = x.shape[-1], g.shape[-1], where.dilation
    columns = _columns(x, k, where)
    more = columns.shape[1] - g.shape[1]
    rows = lax.concatenate(
        [_pad(g, ((i * d, more - i * d), (0, 0))) for i in range(k)], 3
    )
    return _outer(columns, rows).reshape(k, c, k, f).transpose(2, 0, 1, 3)


def rows(x: Image, kernel: Kernel, where: Geometry) -> Output:
    """`patches` of runs of stride pixels in a row, which lie side by side already."""
    k, f = kernel.shape[0], kernel.shape[-1]
    side_by_side = _rows(x, k, where)
    more = where.stride * -(-k // where.stride) - k
    no = (0, 0, 0)
    kernel = lax.pad(kernel, jnp.zeros((), kernel.dtype), [no, (0, more, 0), no, no])
    return _dot(side_by_side, kernel.reshape(-1, f))


def rows_kernel(x: Image, g: Output, where: Geometry, k: int) -> Kernel:
    """The gradient of `rows` by the kernel."""
    c, f = x.shape[-1], g.shape[-1]
    return _outer(_rows(x, k, where), g).reshape(k, -1, c, f)[:, :k]


def folded_input(g: Output, kernel: Kernel, where: Geometry, like: Shape) -> Image:
    """The gradient of `folded` by `x`."""
    fold = functools.partial(_fold, k=kernel.shape[0], where=where)
    shape = jax.eval_shape(fold, like)
    dx = patches_input(g, _fold_kernel(kernel, where), Geometry(), shape)
    (dx,) = jax.linear_transpose(fold, like)(dx)
    return dx


def convolution_input(
    g: Output, kernel: Kernel, where: Geometry, like: Shape, groups: int = 1
) -> Image:
    """The gradient of `convolution` by `x`."""
    forward = functools.partial(convolution, where=where, groups=groups)
    (dx,) = jax.linear_transpose(lambda x: forward(x, kernel), like)(g)
    return dx


def turned_input(g: Output, kernel: Kernel, where: Geometry, like: Shape) -> Image:
    """The gradient of a convolution of stride 1 by `x`, as XLA's."""
    kernel, where = _turned(kernel, where)
    # XLA leaves no convolution to oneDNN whose kernel it sees being reversed.
    return convolution(g, lax.optimization_barrier(kernel), where)


def convolution_kernel(
    x: Image, g: Output, where: Geometry, k: int, groups: int = 1
) -> Kernel:
    """The gradient of `convolution` by the kernel."""
    like = Shape((k, k, x.shape[-1] // groups, g.shape[-1]), x.dtype)
    forward = functools.partial(convolution, where=where, groups=groups)
    (dk,) = jax.linear_transpose(lambda kernel: forward(x, kernel), like)(g)
    return dk


def taps(x: Image, k: int, where: Geometry, fill: float = 0.0) -> list[Other]:
    """What each of k*k taps sees, row by row; `fill` is what the padding holds."""
    s, d = where.stride, where.dilation
    h, w = (where.output(x.shape[1 + i], i, k) for i in range(2))
    x = _pad(x, where.padding, fill)
    b, _, _, c = x.shape
    return [
        lax.slice(
            x,
            (0, i * d, j * d, 0),
            (b, i * d + (h - 1) * s + 1, j * d + (w - 1) * s + 1, c),
            (1, s, s, 1),
        )
        for i in range(k)
        for j in range(k)
    ]


def of_sums(dtype: DTypeLike) -> jnp.dtype:
    """The type in which values of a type are added: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def _columns(x: Image, k: int, where: Geometry) -> Float[Array, "b h2 w2 c2"]:
    """The k pixels of its row that each output sees, for all padded rows."""
    w, d = where.output(x.shape[2], 1, k), where.dilation
    x = _pad(x, where.padding)
    return lax.concatenate([x[:, :, j * d : j * d + w] for j in range(k)], 3)


def _pad(x: Image, padding: Padding, fill: float = 0.0) -> Other:
    config = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    return lax.pad(x, jnp.array(fill, x.dtype), config)


def _spread(x: Image, like: Shape, where: Geometry) -> Other:
    """The transpose of taking every stride-th pixel of a padded image."""
    s = where.stride
    if s == 1 and not any(map(sum, where.padding)):
        return x
    config = [
        (-low, like.shape[1 + i] + low - ((x.shape[1 + i] - 1) * s + 1), s - 1)
        for i, (low, _) in enumerate(where.padding)
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])


def _turned(kernel: Kernel, where: Geometry) -> tuple[Array, Geometry]:
    """The kernel and geometry of the convolution that is the gradient by the input."""
    reach = where.dilation * (kernel.shape[0] - 1)
    padding = tuple((reach - low, reach - high) for low, high in where.padding)
    kernel = lax.rev(kernel, (0, 1)).swapaxes(2, 3)
    return kernel, Geometry(padding=padding, dilation=where.dilation)


def _fold(x: Image, k: int, where: Geometry) -> Other:
    """Makes blocks of stride x stride pixels one pixel: [b, h/s, w/s, s*s*c]."""
    s, side = where.stride, -(-k // where.stride)
    b, *sizes, c = x.shape
    rows = [where.output(size, i, k) + side - 1 for i, size in enumerate(sizes)]
    padding = tuple(
        (low, s * row - size - low)
        for (low, _), row, size in zip(where.padding, rows, sizes, strict=True)
    )
    x = _pad(x, padding).reshape(b, rows[0], s, rows[1], s, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, *rows, s * s * c)


def _rows(x: Image, k: int, where: Geometry) -> Float[Array, "b h2 w2 c2"]:
    """What each output sees in k rows and k columns, rounded up to whole strides."""
    s, side = where.stride, -(-k // where.stride)
    b, height, width, c = x.shape
    h, w = where.output(height, 0, k), where.output(width, 1, k)
    (top, bottom), (left, _) = where.padding
    x = _pad(x, ((top, bottom), (left, s * (w + side - 1) - width - left)))
    x = x.reshape(b, -1, w + side - 1, s * c)
    x = lax.concatenate([x[:, :, i : i + w] for i in range(side)], 3)
    return lax.concatenate([x[:, i : i + (h - 1) * s + 1 : s] for i in range(k)], 3)


def _fold_kernel(kernel: Kernel, where: Geometry) -> Float[Array, "k2 k2 c2 f"]:
    k, _, c, f = kernel.shape
    s, side = where.stride, -(-k // where.stride)
    more = (0, s * side - k, 0)
    kernel = lax.pad(
        kernel, jnp.zeros((), kernel.dtype), [more, more, (0, 0, 0), (0, 0, 0)]
    )
    kernel = kernel.reshape(side, s, side, s, c, f).transpose(0, 2, 1, 3, 4, 5)
    return kernel.reshape(side, side, s * s * c, f)


# Products. XLA's bfloat16 product on CPUs is fast for a row-major left side times a
# row-major right side, and else computed in float32, eight times as slow. It lays out
# in that way what is contracted over more than one axis. Before jax 0.12 it computes in
# float32 where the result is bfloat16 and the CPU has AVX-512's bfloat16 but no AMX.
_THROUGH_SUMS = jax.__version_info__ < (0, 12)


def _dot(x: Image, kernel: Float[Array, "c f"], dtype=None) -> Output:
    return _multiply(x, kernel, ((3,), (0,)), dtype)


def _dot_transposed(g: Output, kernel: Float[Array, "c f"]) -> Image:
    """g @ kernel.T."""
    *pixels, f = g.shape
    part = math.gcd(f, 2)
    g = g.reshape(*pixels, part, f // part)
    kernel = kernel.reshape(-1, part, f // part)
    return _multiply(g, kernel, ((3, 4), (1, 2)))


def _outer(x: Image, g: Output) -> Float[Array, "c f"]:
    """The sum over all pixels of x[c] g[f]."""
    c, f = x.shape[-1], g.shape[-1]
    if x.dtype != jnp.bfloat16:
        x, g = x.reshape(-1, c), g.reshape(-1, f)
        # What is transposed should be narrow; the barrier keeps XLA from swapping back.
        return x.T @ g if c <= f else lax.optimization_barrier(g.T @ x).T
    every = ((0, 1, 2), (0, 1, 2))
    # The barriers keep XLA from fusing what made the left side into its transposition,
    # which reads across the lines of memory, and from transposing the right one.
    if c <= f:
        return _multiply(lax.optimization_barrier(x), g, every)
    g = lax.optimization_barrier(g)
    return lax.optimization_barrier(_multiply(g, x, every)).T


def _multiply(left, right, contracted: tuple, dtype: DTypeLike | None = None):
    """A product of a type, by default that of its factors."""
    dtype = dtype or left.dtype
    through = of_sums(dtype) if _THROUGH_SUMS else dtype
    axes = (contracted, ((), ()))
    found = lax.dot_general(left, right, axes, preferred_element_type=through)
    return found.astype(dtype)


FORMS = {
    "forward": {
        "convolution": convolution,
        "product": product,
        "cross": cross,
        "patches": patches,
        "rows": rows,
    },
    "input": {
        "convolution": convolution_input,
        "product": product_input,
        "cross": cross_input,
        "patches": patches_input,
        "folded": folded_input,
        "turned": turned_input,
    },
    "kernel": {
        "convolution": convolution_kernel,
        "product": product_kernel,
        "cross": cross_kernel,
        "patches": patches_kernel,
        "rows": rows_kernel,
    },
}


def forms_of(direction: str, k: int, where: Geometry) -> list[str]:
    """The forms that can compute a direction of a convolution."""
    turned = ["turned"] * (direction == "input" and where.stride == 1)
    if k == 1:
        return ["convolution", "product", *turned]
    if where.stride == 1:
        return ["convolution", "patches", "cross", *turned]
    if direction != "input":
        return ["convolution", "patches", *["rows"] * (where.dilation == 1)]
    return ["convolution", *["folded"] * (where.dilation == 1)]


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

    It is another one where XLA leaves bfloat16 convolutions to oneDNN (`has_onednn`).

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
    if half and has_onednn():
        if direction == "forward":
            # Of so few pixels a call costs more than the product.
            return "product" if k == 1 and b * size**2 <= 200 else "convolution"
        if direction == "kernel" and k > 1 and c <= 32:
            return "convolution"
        if direction == "input" and not strided and (k > 1 or size > 7):
            return "turned"
    if k == 1:
        return "product"
    if direction == "kernel":
        if strided:
            return "rows" if c < 8 and not dilated else "patches"
        if c <= 16 and not half:
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
def has_onednn() -> bool:
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
    x = Shape((*x.shape[:3], x.shape[3] // n), x.dtype)
    form = _batched_form(direction, k, where)
    block = functools.partial(_apply, direction, form, x=x, k=k, where=where)
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


def convolve(
    x: Image, kernel: Kernel, where: Geometry, groups: int = 1
) -> Float[Array, "b h2 w2 f"]:
    """The convolution of `x` and `kernel`, of `x.dtype`; both are of the same.

    Args:
      x: images.
      kernel: of square windows.
      where: stride, padding and dilation.
      groups: of channels that do not see each other.
    """
    return _convolve(x, kernel, where, groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: Image, kernel: Kernel, where: Geometry, groups: int) -> Output:
    return _convolve_forward(x, kernel, where, groups)[0]


def _convolve_forward(x: Image, kernel: Kernel, where: Geometry, groups: int):
    y = _by_platform("forward", x, kernel, x.shape, len(kernel), where, groups)
    return y, (x, kernel)


def _convolve_backward(where: Geometry, groups: int, saved, g: Output):
    x, kernel = saved
    return (
        _by_platform("input", g, kernel, x.shape, len(kernel), where, groups),
        _by_platform("kernel", x, g, x.shape, len(kernel), where, groups),
    )


_convolve.defvjp(_convolve_forward, _convolve_backward)


# Equal convolutions are traced once; inlined, since calls make other TPU programs.
@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6), inline=True)
def _by_platform(
    direction: str, one, other, x_shape, k: int, where: Geometry, groups: int
):
    x = Shape(x_shape, one.dtype)
    given = {"x": x, "k": k, "where": where}
    xla = functools.partial(_apply, direction, "convolution", **given, groups=groups)
    cpu = functools.partial(_directly, direction, **given)
    if groups > 1:
        cpu = functools.partial(_in_blocks, direction, **given, groups=groups)
    return lax.platform_dependent(one, other, cpu=cpu, default=xla)


def _directly(direction: str, one, other, x: Shape, k: int, where: Geometry):
    """A direction of a convolution without groups, of an image like `x`."""
    b, height, _, c = x.shape
    size = where.output(height, 0, k)
    form = form_of(direction, b, size, c, k, where, x.dtype)
    return _apply(direction, form, one, other, x, k, where)


def _apply(
    direction: str, form: str, one, other, x: Shape, k: int, where: Geometry, **groups
):
    last = {"forward": (), "input": (x,), "kernel": (k,)}[direction]
    return FORMS[direction][form](one, other, where, *last, **groups)
