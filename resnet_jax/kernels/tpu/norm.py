"""Fused 1x1 convolution + batch norm, for TPUs.

A bottleneck's last convolution has four times as many outputs as inputs, and a train
step on TPUs is limited by memory bandwidth. Here the convolution's output is not
written to memory: for y = x W the statistics of y follow from those of x, since its
mean is mean(x) W and its variance diag(W^T cov(x) W). With the statistics known in
advance, the convolution, the norm and the operations after it are one operation. The
gradients do not need y either: for dy = a g + s y + t, as that of batch norm is,

    dx = (a g) W^T + x (W diag(s) W^T) + t W^T,    dW = (x^T g) a + (x^T x) W s + x^T t.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from resnet_jax.kernels.arrays import Image, accumulation_dtype
from resnet_jax.kernels.conv import FusibleConvolution
from resnet_jax.kernels.norm_options import GhostBatchNorm, repeat_for_examples

# With more channels, products of the input with itself take the time that is saved: 512
# channels of 7x7 pixels take as many cycles on v5e either way.
MAX_CHANNELS = 256
# Ghost batches per device. Each has products of its own in the program.
MAX_GHOST_BATCHES = 8

Output = Float[Array, "b h w f"]
Matrix = Float[Array, "c f"]
Vector = Float[Array, "f"]
Statistics = Float[Array, "g f"]


def is_supported(convolution: FusibleConvolution, size: int, mesh: Mesh) -> bool:
    """Returns whether `normalize` can take ghost batches of a size and saves time.

    Args:
      convolution: The convolution before the norm.
      size: The number of examples in a ghost batch.
      mesh: The devices over which the batch is sharded.
    """
    b, _, _, c = convolution.x.shape
    batches, remainder = divmod(b // mesh.size, size)
    are_complete = b % mesh.size == remainder == 0
    fits = size == b or (are_complete and batches <= MAX_GHOST_BATCHES)
    return fits and c <= MAX_CHANNELS


def normalize(
    convolution: FusibleConvolution,
    scale: Vector,
    bias: Vector,
    norm: GhostBatchNorm,
    mesh: Mesh,
) -> tuple[Output, Statistics, Statistics]:
    """Normalises a convolution's output by the statistics of its input.

    The results are those of `kernels.norm.forward` for `convolution.evaluate()`,
    without activation and pooling. Sums are in float32 or wider. The variance is
    computed from a mean square minus a squared mean of the input, so an input channel
    that hardly varies around a mean far from zero makes it less accurate than in
    `kernels.norm.forward`.

    Args:
      convolution: The convolution before the norm.
      scale: The factor of each channel of the output.
      bias: The summand of each channel of the output.
      norm: The norm's parameters. The activation is left to the caller.
      mesh: The devices over which the batch is sharded. Either each device holds
        complete ghost batches and computes on these alone, or the whole batch is one
        ghost batch, and the devices exchange sums.

    Returns:
      The output, and the means and variances of the ghost batches in float32.
    """

    def part(*arrays):
        return _normalize_part(*arrays, norm)

    if mesh.size > 1 and norm.size < len(convolution.x):
        batch, everywhere = P(mesh.axis_names), P()
        part = jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(batch, everywhere, everywhere, everywhere),
            out_specs=batch,
            # The gradients of the replicated arguments are summed after `_backward`.
            check_vma=False,
        )
    kernel = convolution.kernel[0, 0].astype(convolution.x.dtype)
    return part(convolution.x, kernel, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalize_part(
    x: Image, kernel: Matrix, scale: Vector, bias: Vector, norm: GhostBatchNorm
) -> tuple[Output, Statistics, Statistics]:
    return _forward(x, kernel, scale, bias, norm)[0]


def _forward(
    x: Image, kernel: Matrix, scale: Vector, bias: Vector, norm: GhostBatchNorm
) -> tuple[tuple[Output, Statistics, Statistics], tuple[Array, ...]]:
    n = norm.pixels(x)
    wide = kernel.astype(accumulation_dtype(x.dtype))
    total = _sum_over_pixels(x, norm.size).sum(axis=1)
    gram = _outer_products(x, x, norm.size)
    mean_x = total / n
    cov = gram / n - mean_x[:, :, None] * mean_x[:, None, :]
    mean = _small_einsum("gc,cf->gf", mean_x, wide)
    var = jnp.maximum((_small_einsum("gcd,df->gcf", cov, wide) * wide).sum(axis=1), 0)
    factor = scale / jnp.sqrt(var + norm.epsilon)
    y = _dot(x, kernel)
    out = y * repeat_for_examples(factor, norm.size)
    out = out + repeat_for_examples(bias - mean * factor, norm.size)
    results = out.astype(norm.dtype), mean, var
    return results, (x, kernel, scale, mean, var, total, gram)


def _backward(
    norm: GhostBatchNorm, saved: tuple[Array, ...], cotangents: tuple[Array, ...]
) -> tuple[Image, Matrix, Vector, Vector]:
    x, kernel, scale, mean, var, total, gram = saved
    g, _, _ = cotangents
    n = norm.pixels(x)
    wide = kernel.astype(accumulation_dtype(x.dtype))
    inverse = 1 / jnp.sqrt(var + norm.epsilon)
    factor = scale * inverse
    total_g = _sum_over_pixels(g, norm.size).sum(axis=1)
    along_x = _outer_products(x, g, norm.size)
    # The sum of g times the normalised output.
    along = ((along_x * wide).sum(axis=1) - mean * total_g) * inverse
    slope = -along * inverse * factor / n
    shift = -mean * slope - factor * total_g / n

    dkernel = (
        along_x * factor[:, None]
        + _small_einsum("gcd,df->gcf", gram, wide) * slope[:, None]
        + total[:, :, None] * shift[:, None]
    ).sum(axis=0)
    between = _small_einsum("cf,gf,df->gcd", wide, slope, wide).astype(x.dtype)
    scaled = (g * repeat_for_examples(factor, norm.size)).astype(x.dtype)
    # The first of the two products is written to memory, so it is the smaller one, and
    # it is rounded.
    correction = _dot_per_ghost_batch(x, between, norm.size).astype(x.dtype)
    dx = _dot(scaled, kernel.T) + lax.optimization_barrier(correction)
    dx = dx + repeat_for_examples(_small_einsum("gf,cf->gc", shift, wide), norm.size)
    return (
        dx.astype(x.dtype),
        dkernel.astype(kernel.dtype),
        along.sum(axis=0),
        total_g.sum(axis=0),
    )


_normalize_part.defvjp(_forward, _backward)


def _sum_over_pixels(x: Image, size: int) -> Float[Array, "g n c"]:
    """Sums over each example's pixels, without dividing an axis of `x`."""
    examples = x.sum(axis=(1, 2), dtype=accumulation_dtype(x.dtype))
    return examples.reshape(-1, size, x.shape[-1])


def _outer_products(x: Image, g: Output, size: int) -> Float[Array, "g c f"]:
    """Sums x[c] g[f] over all pixels of each ghost batch.

    There is one product per ghost batch, since compilers for TPUs compile a product
    with an axis of ghost batches to a slower program.
    """
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=(((0, 1, 2), (0, 1, 2)), ((), ())),
        preferred_element_type=accumulation_dtype(x.dtype),
    )
    starts = range(0, len(x), size)
    xs, gs = ([array[i : i + size] for i in starts] for array in (x, g))
    return jnp.stack([product(*pair) for pair in zip(xs, gs, strict=True)])


def _dot(x: Image, kernel: Matrix) -> Output:
    contracted = (((3,), (0,)), ((), ()))
    return lax.dot_general(
        x, kernel, contracted, preferred_element_type=accumulation_dtype(x.dtype)
    )


def _dot_per_ghost_batch(x: Image, kernels: Float[Array, "g c d"], size: int) -> Image:
    """Multiplies each ghost batch with a kernel of its own.

    It is one product: each example's channels are placed at those of its ghost batch,
    and zeros at all others, which compilers for TPUs never write to memory.
    """
    b, h, w, _ = x.shape
    own = jnp.arange(b)[:, None] // size == jnp.arange(len(kernels))
    expanded = x[:, :, :, None] * own[:, None, None, :, None].astype(x.dtype)
    return _dot(expanded.reshape(b, h, w, -1), kernels.reshape(-1, kernels.shape[-1]))


# Products of small matrices are computed in full precision.
_small_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
