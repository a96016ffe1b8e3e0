"""The forms that a convolution and its gradients can take on a CPU.

convolution: XLA's.
product: a 1x1 kernel is one product, of the pixels that it sees.
patches: one product with the k*k pixels that each output sees laid side by side.
cross: of stride 1: one product of pixels of a row laid side by side with all rows of
    the kernel, which are then added.
rows, folded: `patches` of a strided convolution seen as one of stride 1, in which
    stride pixels of a row, or of stride rows, are one with as many times the channels.
turned: of stride 1: XLA's, of the gradient with the kernel turned.
onednn: oneDNN's convolution, where it is installed (`onednn.computes`); products of the
    other forms are then oneDNN's, too, where XLA's are slower.

`python -m resnet_jax.bench convolutions` measures them side by side.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from resnet_jax.kernels import onednn

Image = Float[Array, "b h w c"]
Kernel = Float[Array, "k k i f"]
Output = Float[Array, "b h2 w2 f"]
Other = Float[Array, "b _ _ _"]
# What is only moved is of any type.
Values = Shaped[Array, "b h w c"]
OtherValues = Shaped[Array, "b _ _ _"]
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
        return max((size + sum(self.padding[side]) - span) // self.stride + 1, 0)


# Before jax 0.12 XLA computes with bfloat16 on CPUs in float32, also where it is only
# moved, and products whose result is bfloat16 unless the CPU has AMX.
HALF_IS_SLOW = jax.__version_info__ < (0, 12)


def moving(move: Callable) -> Callable:
    """Makes `move` take bfloat16 as it is, and derivatives of it in float32.

    The transpose of taking a pixel for several outputs adds what they give to it.

    Args:
      move: of arrays, whose values it only moves, and, behind them, other arguments.
    """

    @functools.wraps(move)
    def moved(*args):
        arrays = [arg for arg in args if isinstance(arg, jax.Array)]
        others = args[len(arrays) :]
        if any(array.dtype != jnp.bfloat16 for array in arrays):
            return move(*args)

        @jax.custom_jvp
        def of_half(*arrays):
            if not HALF_IS_SLOW:
                return move(*arrays, *others)
            bits = [lax.bitcast_convert_type(array, jnp.uint16) for array in arrays]
            back = functools.partial(lax.bitcast_convert_type, new_dtype=jnp.bfloat16)
            return jax.tree.map(back, move(*bits, *others))

        @of_half.defjvp
        def _(primals, tangents):
            wide = move(*(tangent.astype(jnp.float32) for tangent in tangents), *others)
            narrow = jax.tree.map(lambda tangent: tangent.astype(jnp.bfloat16), wide)
            return of_half(*primals), narrow

        return of_half(*arrays)

    return moved


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
    k, f = kernel.shape[0], kernel.shape[-1]
    return _dot(_taps_beside(x, k, where), kernel.reshape(-1, f))


def patches_input(g: Output, kernel: Kernel, where: Geometry, like: Shape) -> Image:
    """The gradient of a convolution of stride 1 by `x`: one with the kernel turned."""
    return patches(g, *_turned(kernel, where))


def patches_kernel(x: Image, g: Output, where: Geometry, k: int) -> Kernel:
    """The gradient of `patches` by the kernel."""
    return _outer(_taps_beside(x, k, where), g).reshape(k, k, x.shape[-1], g.shape[-1])


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
    c, f = x.shape[-1], g.shape[-1]
    columns = _columns(x, k, where)
    rows = _rows_beside(g, k, columns.shape[1], where)
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
    dx = patches_input(g, _fold_kernel(kernel, where), Geometry(), like)
    return _unfold(dx, like.shape, where)


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
    like = like_of(x, (k, k, x.shape[-1] // groups, g.shape[-1]))
    forward = functools.partial(convolution, where=where, groups=groups)
    (dk,) = jax.linear_transpose(lambda kernel: forward(x, kernel), like)(g)
    return dk


def by_onednn(direction: str, xla: Callable) -> Callable:
    """The form of oneDNN, whose derivatives are those of XLA's, `xla`."""

    def form(one: Other, other: Other, where: Geometry, *last) -> Other:
        def plain(one, other):
            return xla(one, other.astype(one.dtype), where, *last)

        result = like_of(one, jax.eval_shape(plain, one, other).shape)
        numbers = (where.stride, where.dilation, *where.padding[0], *where.padding[1])

        def call(one, other):
            return onednn.convolve(direction, one, other, result, numbers)

        return _with_derivatives_of(plain, call)(one, other)

    return form


def _with_derivatives_of(plain: Callable, call: Callable) -> Callable:
    """What `call` computes of two arrays; it has no derivatives and equals `plain`."""
    call = jax.custom_jvp(call)
    call.defjvp(
        lambda primals, tangents: (call(*primals), jax.jvp(plain, primals, tangents)[1])
    )
    return call


@moving
def taps(x: Values, k: int, where: Geometry) -> list[OtherValues]:
    """What each of k*k taps sees, row by row."""
    s, d = where.stride, where.dilation
    h, w = (where.output(x.shape[1 + i], i, k) for i in range(2))
    x = pad(x, where.padding)
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


def pad(x: Values, padding: Padding, fill: float | int = 0) -> OtherValues:
    """Puts pixels of one value around height and width."""
    config = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    return moving(lax.pad)(x, jnp.array(fill, x.dtype), config)


@jax.custom_jvp
def unfused(x: Array) -> Array:
    """What XLA does not fuse into the transposition that a product makes of it.

    Such a fusion reads across the lines of memory, many times as slowly.
    """
    if jax.__version_info__ >= (0, 12):
        return lax.optimization_barrier(x)
    # Before, XLA drops barriers ahead of its fusions, but not loops, whose length it
    # finds only then.
    once = lax.optimization_barrier(jnp.int32(1))
    return lax.fori_loop(0, once, lambda _, x: lax.optimization_barrier(x), x)


@unfused.defjvp
def _unfused_tangent(primals, tangents):
    return unfused(*primals), *tangents


def like_of(array: Array, shape: tuple[int, ...]) -> Shape:
    """What is as an array, also to a `jax.shard_map` around it, but for its shape."""
    aval = jax.typeof(array)
    return Shape(
        shape,
        aval.dtype,
        sharding=aval.sharding.update(spec=P(*[None] * len(shape))),
        manual_axis_type=aval.manual_axis_type,
    )


def of_sums(dtype: DTypeLike) -> jnp.dtype:
    """The type in which values of a type are added: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


@moving
def _taps_beside(x: Values, k: int, where: Geometry) -> OtherValues:
    """The pixels that each output sees, side by side."""
    return lax.concatenate(taps(x, k, where), 3)


@moving
def _columns(x: Values, k: int, where: Geometry) -> OtherValues:
    """The k pixels of its row that each output sees, for all padded rows."""
    w, d = where.output(x.shape[2], 1, k), where.dilation
    x = pad(x, where.padding)
    return lax.concatenate([x[:, :, j * d : j * d + w] for j in range(k)], 3)


@moving
def _rows_beside(g: Values, k: int, height: int, where: Geometry) -> OtherValues:
    """The gradients of the rows that see each padded row, side by side."""
    d, more = where.dilation, height - g.shape[1]
    rows = [pad(g, ((i * d, more - i * d), (0, 0))) for i in range(k)]
    return lax.concatenate(rows, 3)


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


@moving
def _unfold(x: Values, shape: tuple[int, ...], where: Geometry) -> OtherValues:
    """The transpose of making blocks of stride x stride pixels one pixel.

    Args:
      x: [b, h/s, w/s, s*s*c].
      shape: of the image without padding.
      where: stride and padding.
    """
    s, (b, *sizes, c) = where.stride, shape
    rows = x.shape[1:3]
    x = x.reshape(b, *rows, s, s, c).transpose(0, 1, 3, 2, 4, 5)
    padding = tuple(
        (-low, size + low - s * row)
        for (low, _), row, size in zip(where.padding, rows, sizes, strict=True)
    )
    return pad(x.reshape(b, rows[0] * s, rows[1] * s, c), padding)


@moving
def _rows(x: Values, k: int, where: Geometry) -> OtherValues:
    """What each output sees in k rows and k columns, rounded up to whole strides."""
    s, side = where.stride, -(-k // where.stride)
    b, height, width, c = x.shape
    h, w = where.output(height, 0, k), where.output(width, 1, k)
    (top, bottom), (left, _) = where.padding
    x = pad(x, ((top, bottom), (left, s * (w + side - 1) - width - left)))
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
# in that way what is contracted over more than one axis.


def _dot(x: Image, kernel: Float[Array, "c f"], dtype=None) -> Output:
    # Of two axes, since the derivative by the kernel would else be a transposed product
    # over several, whose sums jax 0.12 takes in bfloat16.
    found = _multiply(x.reshape(-1, x.shape[-1]), kernel, ((1,), (0,)), dtype)
    return found.reshape(*x.shape[:-1], -1)


def _dot_transposed(g: Output, kernel: Float[Array, "c f"]) -> Image:
    """g @ kernel.T."""
    *pixels, f = g.shape
    if _by_onednn(g.dtype, math.prod(pixels)):
        found = _multiply(g.reshape(-1, f), kernel, ((1,), (1,)))
        return found.reshape(*pixels, -1)
    part = math.gcd(f, 2)
    g = g.reshape(*pixels, part, f // part)
    kernel = kernel.reshape(-1, part, f // part)
    return _multiply(g, kernel, ((3, 4), (1, 2)))


def _outer(x: Image, g: Output) -> Float[Array, "c f"]:
    """The sum over all pixels of x[c] g[f]."""
    c, f = x.shape[-1], g.shape[-1]
    if _by_onednn(x.dtype, math.prod(x.shape[:-1])):
        return _multiply(x.reshape(-1, c), g.reshape(-1, f), ((0,), (0,)))
    if x.dtype != jnp.bfloat16:
        x, g = x.reshape(-1, c), g.reshape(-1, f)
        # What is transposed should be narrow; the barrier keeps XLA from swapping back.
        return x.T @ g if c <= f else lax.optimization_barrier(g.T @ x).T
    every = ((0, 1, 2), (0, 1, 2))
    if c <= f:
        return _multiply(unfused(x), g, every)
    # The barrier keeps XLA from swapping back.
    return lax.optimization_barrier(_multiply(unfused(g), x, every)).T


def _multiply(left, right, contracted: tuple, dtype: DTypeLike | None = None):
    """A product of a type, by default that of its factors."""
    dtype = dtype or left.dtype
    through = of_sums(dtype) if HALF_IS_SLOW else dtype
    axes = (contracted, ((), ()))

    def by_xla(left, right):
        found = lax.dot_general(left, right, axes, preferred_element_type=through)
        return found.astype(dtype)

    if not _by_onednn(left.dtype, left.shape[0]):
        return by_xla(left, right)
    (ours,), (theirs,) = contracted
    shape = left.shape[1 - ours], right.shape[1 - theirs]
    result = like_of(left, shape).update(dtype=dtype)

    def call(left, right):
        return onednn.multiply(left, right, (ours, theirs), result)

    return _with_derivatives_of(by_xla, call)(left, right)


def _by_onednn(dtype: DTypeLike, pixels: int) -> bool:
    """Whether products are left to oneDNN: not where XLA's of bfloat16 are faster."""
    if dtype == jnp.bfloat16 and not HALF_IS_SLOW:
        return pixels >= onednn.MANY and onednn.widens()
    return onednn.computes(dtype)


FORMS = {
    "forward": {
        "convolution": convolution,
        "onednn": by_onednn("forward", convolution),
        "product": product,
        "cross": cross,
        "patches": patches,
        "rows": rows,
    },
    "input": {
        "convolution": convolution_input,
        "onednn": by_onednn("input", convolution_input),
        "product": product_input,
        "cross": cross_input,
        "patches": patches_input,
        "folded": folded_input,
        "turned": turned_input,
    },
    "kernel": {
        "convolution": convolution_kernel,
        "onednn": by_onednn("kernel", convolution_kernel),
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


def apply(
    direction: str, form: str, one, other, x: Shape, k: int, where: Geometry, **groups
) -> Array:
    """A direction of a convolution in a form.

    Args:
      direction: `forward`, `input` or `kernel`: what is computed.
      form: one of `forms_of`.
      one: the image, or, for its own gradient, that of the output.
      other: the kernel, or, for its own gradient, that of the output.
      x: shape and type of the image.
      k: side of the kernel.
      where: stride, padding and dilation.
      **groups: `groups`, which only the form `convolution` has.
    """
    last = {"forward": (), "input": (x,), "kernel": (k,)}[direction]
    return FORMS[direction][form](one, other, where, *last, **groups)
