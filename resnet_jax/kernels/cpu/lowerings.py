"""The lowerings of a convolution and its two gradients on a CPU.

convolution: XLA's own convolution.
matmul: a 1x1 kernel is one matrix product, with the pixels that it sees.
im2col: one product with the k*k pixels that each output sees, side by side.
row_im2col: at stride 1, one product of the k pixels of a row, side by side, with all
    rows of the kernel; the rows of the result are shifted and added.
width_to_depth: `im2col` of a strided convolution, after `stride` neighbours in a row
    have become one pixel with `stride` times the channels.
space_to_depth: the same with blocks of `stride` x `stride` pixels; the convolution
    becomes one of stride 1.
flipped_kernel: at stride 1, XLA's convolution of the output's gradient with the flipped
    kernel.
onednn: oneDNN's convolution, where it is installed (`onednn.computes`). The products of
    other lowerings are oneDNN's, too, where XLA's are slower.

`python -m resnet_jax.bench convolutions` measures them side by side.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from resnet_jax.kernels import onednn, plain
from resnet_jax.kernels.arrays import (
    Image,
    Kernel,
    Output,
    Shape,
    accumulation_dtype,
    shape_like,
)
from resnet_jax.kernels.cpu.matmul import (
    dot,
    dot_transposed,
    outer_product,
    with_derivatives_of,
)
from resnet_jax.kernels.cpu.windows import (
    MovedValues,
    Values,
    moves_values,
    pad,
    taps,
)
from resnet_jax.kernels.geometry import Geometry, Padding

# A lowering of `forward` takes the images, the kernel and the geometry; one of `input`
# the output's gradient, the kernel, the geometry, and the images' shape and dtype; one
# of `kernel` the images, the output's gradient, the geometry, and the kernel's side.
Lowering = Callable[..., Array]


def matmul(x: Image, kernel: Kernel, geometry: Geometry) -> Output:
    """Multiplies the pixels that a 1x1 kernel sees with it."""
    return dot(taps(x, kernel.shape[0], geometry)[0], kernel[0, 0])


def matmul_input(g: Output, kernel: Kernel, geometry: Geometry, like: Shape) -> Image:
    """Computes the gradient of `matmul` with respect to `x`."""
    return _spread(dot_transposed(g, kernel[0, 0]), like, geometry)


def matmul_kernel(x: Image, g: Output, geometry: Geometry, k: int) -> Kernel:
    """Computes the gradient of `matmul` with respect to the kernel."""
    (pixels,) = taps(x, k, geometry)
    return outer_product(pixels, g)[None, None]


def im2col(x: Image, kernel: Kernel, geometry: Geometry) -> Output:
    """Multiplies all pixels that an output sees, side by side, with the kernel."""
    k, f = kernel.shape[0], kernel.shape[-1]
    return dot(_taps_side_by_side(x, k, geometry), kernel.reshape(-1, f))


def im2col_input(g: Output, kernel: Kernel, geometry: Geometry, like: Shape) -> Image:
    """Computes the gradient of a convolution of stride 1 by `im2col`."""
    return im2col(g, *_flipped(kernel, geometry))


def im2col_kernel(x: Image, g: Output, geometry: Geometry, k: int) -> Kernel:
    """Computes the gradient of `im2col` with respect to the kernel."""
    columns = _taps_side_by_side(x, k, geometry)
    return outer_product(columns, g).reshape(k, k, x.shape[-1], g.shape[-1])


def row_im2col(x: Image, kernel: Kernel, geometry: Geometry) -> Output:
    """Multiplies the k pixels of a row with all rows of the kernel, at stride 1."""
    k, _, c, f = kernel.shape
    columns = _columns(x, k, geometry)
    by_row = kernel.transpose(1, 2, 0, 3).reshape(k * c, k * f)
    sums = accumulation_dtype(x.dtype)
    product = dot(columns, by_row, sums)
    h, d = geometry.output_length(x.shape[1], 0, k), geometry.dilation
    rows = [
        product[:, i * d : i * d + h, :, i * f : (i + 1) * f].astype(sums)
        for i in range(k)
    ]
    return functools.reduce(jnp.add, rows).astype(x.dtype)


def row_im2col_input(
    g: Output, kernel: Kernel, geometry: Geometry, like: Shape
) -> Image:
    """Computes the gradient of `row_im2col` with respect to `x`."""
    return row_im2col(g, *_flipped(kernel, geometry))


def row_im2col_kernel(x: Image, g: Output, geometry: Geometry, k: int) -> Kernel:
    """Computes the gradient of `row_im2col` with respect to the kernel."""
    c, f = x.shape[-1], g.shape[-1]
    columns = _columns(x, k, geometry)
    rows = _rows_side_by_side(g, k, columns.shape[1], geometry)
    return outer_product(columns, rows).reshape(k, c, k, f).transpose(2, 0, 1, 3)


def width_to_depth(x: Image, kernel: Kernel, geometry: Geometry) -> Output:
    """Computes `im2col` from runs of `stride` pixels, which are adjacent in memory."""
    k, f = kernel.shape[0], kernel.shape[-1]
    columns = _runs_side_by_side(x, k, geometry)
    added_columns = geometry.stride * -(-k // geometry.stride) - k
    no_padding = (0, 0, 0)
    kernel = lax.pad(
        kernel,
        jnp.zeros((), kernel.dtype),
        [no_padding, (0, added_columns, 0), no_padding, no_padding],
    )
    return dot(columns, kernel.reshape(-1, f))


def width_to_depth_kernel(x: Image, g: Output, geometry: Geometry, k: int) -> Kernel:
    """Computes the gradient of `width_to_depth` with respect to the kernel."""
    c, f = x.shape[-1], g.shape[-1]
    columns = _runs_side_by_side(x, k, geometry)
    return outer_product(columns, g).reshape(k, -1, c, f)[:, :k]


def space_to_depth_input(
    g: Output, kernel: Kernel, geometry: Geometry, like: Shape
) -> Image:
    """Computes the gradient of a strided convolution by blocks of its pixels."""
    kernel = _space_to_depth_of_kernel(kernel, geometry)
    dx = im2col_input(g, kernel, Geometry(), like)
    return _depth_to_space(dx, like.shape, geometry)


def flipped_kernel_input(
    g: Output, kernel: Kernel, geometry: Geometry, like: Shape
) -> Image:
    """Computes the gradient of a convolution of stride 1 by XLA's convolution."""
    kernel, geometry = _flipped(kernel, geometry)
    # XLA does not leave a convolution to oneDNN if it sees that its kernel is reversed.
    return plain.convolution(g, lax.optimization_barrier(kernel), geometry)


def by_onednn(direction: str, xla: Lowering) -> Lowering:
    """Makes the lowering to oneDNN, whose derivatives are those of XLA's, `xla`."""

    def lowering(left: Array, right: Array, geometry: Geometry, *last) -> Array:
        def by_xla(left, right):
            return xla(left, right.astype(left.dtype), geometry, *last)

        result = shape_like(left, jax.eval_shape(by_xla, left, right).shape)
        rows, columns = geometry.padding
        numbers = (geometry.stride, geometry.dilation, *rows, *columns)

        def call(left, right):
            return onednn.convolve(direction, left, right, result, numbers)

        return with_derivatives_of(by_xla, call)(left, right)

    return lowering


LOWERINGS: dict[str, dict[str, Lowering]] = {
    "forward": {
        "convolution": plain.convolution,
        "onednn": by_onednn("forward", plain.convolution),
        "matmul": matmul,
        "row_im2col": row_im2col,
        "im2col": im2col,
        "width_to_depth": width_to_depth,
    },
    "input": {
        "convolution": plain.convolution_input,
        "onednn": by_onednn("input", plain.convolution_input),
        "matmul": matmul_input,
        "row_im2col": row_im2col_input,
        "im2col": im2col_input,
        "space_to_depth": space_to_depth_input,
        "flipped_kernel": flipped_kernel_input,
    },
    "kernel": {
        "convolution": plain.convolution_kernel,
        "onednn": by_onednn("kernel", plain.convolution_kernel),
        "matmul": matmul_kernel,
        "row_im2col": row_im2col_kernel,
        "im2col": im2col_kernel,
        "width_to_depth": width_to_depth_kernel,
    },
}


def possible_lowerings(direction: str, k: int, geometry: Geometry) -> list[str]:
    """Lists the lowerings without oneDNN that can compute a direction.

    Args:
      direction: `forward`, `input` or `kernel`.
      k: The side of the kernel in pixels.
      geometry: Stride, padding and dilation.
    """
    strided, dilated = geometry.stride > 1, geometry.dilation > 1
    flipped = ["flipped_kernel"] * (direction == "input" and not strided)
    if k == 1:
        return ["convolution", "matmul", *flipped]
    if not strided:
        return ["convolution", "im2col", "row_im2col", *flipped]
    if direction != "input":
        return ["convolution", "im2col", *["width_to_depth"] * (not dilated)]
    return ["convolution", *["space_to_depth"] * (not dilated)]


def lower(
    direction: str,
    lowering: str,
    left: Array,
    right: Array,
    x: Shape,
    k: int,
    geometry: Geometry,
) -> Array:
    """Computes a direction of a convolution without groups.

    Args:
      direction: `forward`, or `input` or `kernel` for the gradient with respect to it.
      lowering: One of `possible_lowerings`, or `onednn`.
      left: The images, or for `input` the output's gradient.
      right: The kernel, or for `kernel` the output's gradient.
      x: Shape and dtype of the images.
      k: The side of the kernel in pixels.
      geometry: Stride, padding and dilation.
    """
    compute = LOWERINGS[direction][lowering]
    if direction == "forward":
        return compute(left, right, geometry)
    return compute(left, right, geometry, x if direction == "input" else k)


@moves_values
def _taps_side_by_side(x: Values, k: int, geometry: Geometry) -> MovedValues:
    """Returns the pixels that each output sees, side by side."""
    return lax.concatenate(taps(x, k, geometry), 3)


@moves_values
def _columns(x: Values, k: int, geometry: Geometry) -> MovedValues:
    """Returns the k pixels of its row that each output sees, for all padded rows."""
    w, d = geometry.output_length(x.shape[2], 1, k), geometry.dilation
    x = pad(x, geometry.padding)
    return lax.concatenate([x[:, :, j * d : j * d + w] for j in range(k)], 3)


@moves_values
def _rows_side_by_side(
    g: Values, k: int, height: int, geometry: Geometry
) -> MovedValues:
    """Returns the gradients of the rows that see each padded row, side by side."""
    d, added_rows = geometry.dilation, height - g.shape[1]
    rows = [pad(g, ((i * d, added_rows - i * d), (0, 0))) for i in range(k)]
    return lax.concatenate(rows, 3)


def _spread(x: Output, like: Shape, geometry: Geometry) -> Image:
    """Computes the transpose of taking every stride-th pixel of a padded image."""
    s = geometry.stride
    if s == 1 and not any(map(sum, geometry.padding)):
        return x
    config = [
        (-low, like.shape[1 + i] + low - ((x.shape[1 + i] - 1) * s + 1), s - 1)
        for i, (low, _) in enumerate(geometry.padding)
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])


def _flipped(
    kernel: Kernel, geometry: Geometry
) -> tuple[Float[Array, "k k f i"], Geometry]:
    """Returns kernel and geometry of the convolution that computes `input`."""
    reach = geometry.dilation * (kernel.shape[0] - 1)
    (top, bottom), (left, right) = geometry.padding
    padding = (reach - top, reach - bottom), (reach - left, reach - right)
    kernel = lax.rev(kernel, (0, 1)).swapaxes(2, 3)
    return kernel, Geometry(padding=padding, dilation=geometry.dilation)


@moves_values
def _depth_to_space(
    x: Values, shape: tuple[int, ...], geometry: Geometry
) -> MovedValues:
    """Computes the transpose of making blocks of stride x stride pixels one pixel.

    Args:
      x: Blocks of pixels, [b, h/s, w/s, s*s*c].
      shape: The image's shape without padding.
      geometry: Stride and padding.
    """
    s, (b, height, width, c) = geometry.stride, shape
    rows, columns = x.shape[1:3]
    x = x.reshape(b, rows, columns, s, s, c).transpose(0, 1, 3, 2, 4, 5)
    (top, _), (left, _) = geometry.padding
    padding: Padding = (
        (-top, height + top - s * rows),
        (-left, width + left - s * columns),
    )
    return pad(x.reshape(b, rows * s, columns * s, c), padding)


@moves_values
def _runs_side_by_side(x: Values, k: int, geometry: Geometry) -> MovedValues:
    """Returns the pixels that each output sees in k rows, side by side.

    They are k columns wide, rounded up to a multiple of the stride.
    """
    s, runs = geometry.stride, -(-k // geometry.stride)
    b, height, width, c = x.shape
    h = geometry.output_length(height, 0, k)
    w = geometry.output_length(width, 1, k)
    (top, bottom), (left, _) = geometry.padding
    x = pad(x, ((top, bottom), (left, s * (w + runs - 1) - width - left)))
    x = x.reshape(b, -1, w + runs - 1, s * c)
    x = lax.concatenate([x[:, :, i : i + w] for i in range(runs)], 3)
    return lax.concatenate([x[:, i : i + (h - 1) * s + 1 : s] for i in range(k)], 3)


def _space_to_depth_of_kernel(
    kernel: Kernel, geometry: Geometry
) -> Float[Array, "k2 k2 c2 f"]:
    """Returns the kernel for images whose blocks of pixels are one pixel each."""
    k, _, c, f = kernel.shape
    s, side = geometry.stride, -(-k // geometry.stride)
    padding = (0, s * side - k, 0)
    kernel = lax.pad(
        kernel, jnp.zeros((), kernel.dtype), [padding, padding, (0, 0, 0), (0, 0, 0)]
    )
    kernel = kernel.reshape(side, s, side, s, c, f).transpose(0, 2, 1, 3, 4, 5)
    return kernel.reshape(side, side, s * s * c, f)
