"""Batch norm of 1x1 convolutions whose outputs are never written, for TPUs.

A bottleneck's last convolution gives four times as many numbers as it takes, and what
limits a train step on TPUs is what is written and read. For y = x W, the statistics of
y follow from those of x: its mean is mean(x) W, its variance diag(W^T cov(x) W). With
these known beforehand, convolution, norm and what comes after it are one operation. The
gradients need no y either: for dy = a g + s y + t, as that of batch norm is,

    dx = (a g) W^T + x (W diag(s) W^T) + t W^T,    dW = (x^T g) a + (x^T x) W s + x^T t.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from resnet_jax.kernels.conv import convolve
from resnet_jax.kernels.cpu.conv import Geometry, of_sums

# With more, products of the input with itself take the time that is saved: 512 channels
# of 7x7 pixels take as many cycles on v5e either way.
MOST_CHANNELS = 256
# Of a device: each has its own products in the program.
MOST_GROUPS = 8

Image = Float[Array, "b h w c"]
Output = Float[Array, "b h w f"]
Matrix = Float[Array, "c f"]
Vector = Float[Array, "f"]
Statistics = Float[Array, "g f"]


@flax.struct.dataclass
class Product:
    """A convolution of stride 1 that is left to whoever takes it.

    Attributes:
      x: what is convolved.
      kernel: 1x1, `kernels.conv.as_taken`.
    """

    x: Image
    kernel: Float[Array, "1 1 c f"]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of what the convolution gives."""
        return *self.x.shape[:3], self.kernel.shape[-1]

    def evaluate(self) -> Output:
        """The convolution."""
        return convolve(self.x, self.kernel, Geometry())


def suits(product: Product, size: int, mesh: Mesh) -> bool:
    """Whether `normalize` can take groups of `size`, and saves what it is for."""
    b, _, _, c = product.x.shape
    groups, rest = divmod(b // mesh.size, size)
    whole = size == b or (b % mesh.size == rest == 0 and groups <= MOST_GROUPS)
    return whole and c <= MOST_CHANNELS


def normalize(
    product: Product, scale: Vector, bias: Vector, of, mesh: Mesh
) -> tuple[Output, Statistics, Statistics]:
    """Batch norm of `product.evaluate()`, as `norms.forward` without pooling gives it.

    Sums are of float32 or more. The variance is a mean square less a squared mean of
    the input, so that a channel of it which hardly varies around a mean far from zero
    is known less well than in `norms.forward`.

    Args:
      product: what is normalised.
      scale, bias: of each channel.
      of: the `norms.Normalization`, whose activation is left to the caller.
      mesh: the devices over which the batch is spread. Each holds whole groups and
        computes on these alone, or the batch is one group, and they exchange sums.

    Returns:
      The output, and the groups' means and variances, float32.
    """

    def part(*arrays):
        return _normalize_part(*arrays, of)

    if mesh.size > 1 and of.size < len(product.x):
        batch, everywhere = P(mesh.axis_names), P()
        part = jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(batch, everywhere, everywhere, everywhere),
            out_specs=batch,
            # The gradients of what is everywhere are added up behind `_backward`.
            check_vma=False,
        )
    kernel = product.kernel[0, 0].astype(product.x.dtype)
    return part(product.x, kernel, scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalize_part(
    x: Image, kernel: Matrix, scale: Vector, bias: Vector, of
) -> tuple[Output, Statistics, Statistics]:
    return _forward(x, kernel, scale, bias, of)[0]


def _forward(x: Image, kernel: Matrix, scale: Vector, bias: Vector, of):
    n = of.pixels(x)
    wide = kernel.astype(of_sums(x.dtype))
    total = _by_group(x, of.size).sum(axis=1)
    gram = _outer(x, x, of.size)
    mean_x = total / n
    cov = gram / n - mean_x[:, :, None] * mean_x[:, None, :]
    mean = _small("gc,cf->gf", mean_x, wide)
    var = jnp.maximum((_small("gcd,df->gcf", cov, wide) * wide).sum(axis=1), 0)
    factor = scale / jnp.sqrt(var + of.epsilon)
    y = _dot(x, kernel)
    out = y * of_examples(factor, of.size)
    out = out + of_examples(bias - mean * factor, of.size)
    found = out.astype(of.dtype), mean, var
    return found, (x, kernel, scale, mean, var, total, gram)


def _backward(of, saved, cotangents):
    x, kernel, scale, mean, var, total, gram = saved
    g, _, _ = cotangents
    n = of.pixels(x)
    wide = kernel.astype(of_sums(x.dtype))
    inverse = 1 / jnp.sqrt(var + of.epsilon)
    factor = scale * inverse
    total_g = _by_group(g, of.size).sum(axis=1)
    along_x = _outer(x, g, of.size)
    # The sum of g times the normalised output.
    along = ((along_x * wide).sum(axis=1) - mean * total_g) * inverse
    slope = -along * inverse * factor / n
    shift = -mean * slope - factor * total_g / n

    dkernel = (
        along_x * factor[:, None]
        + _small("gcd,df->gcf", gram, wide) * slope[:, None]
        + total[:, :, None] * shift[:, None]
    ).sum(axis=0)
    between = _small("cf,gf,df->gcd", wide, slope, wide).astype(x.dtype)
    scaled = (g * of_examples(factor, of.size)).astype(x.dtype)
    # The product that comes first is written to memory: the smaller one, rounded.
    correction = _dot_by_group(x, between, of.size).astype(x.dtype)
    dx = _dot(scaled, kernel.T) + lax.optimization_barrier(correction)
    dx = dx + of_examples(_small("gf,cf->gc", shift, wide), of.size)
    return (
        dx.astype(x.dtype),
        dkernel.astype(kernel.dtype),
        along.sum(axis=0),
        total_g.sum(axis=0),
    )


_normalize_part.defvjp(_forward, _backward)


def _cut(x: Image, size: int) -> list[Float[Array, "n h w c"]]:
    return [x[i : i + size] for i in range(0, len(x), size)]


def _by_group(x: Image, size: int) -> Float[Array, "g n c"]:
    """Sums over each example's pixels, which take no axis of `x` apart."""
    of_examples = x.sum(axis=(1, 2), dtype=of_sums(x.dtype))
    return of_examples.reshape(-1, size, x.shape[-1])


def _outer(x: Image, g: Output, size: int) -> Float[Array, "g c f"]:
    """The sum of x[c] g[f] over all pixels of each group.

    A product a group: compilers for TPUs do worse with an axis of groups here.
    """
    pixels = (((0, 1, 2), (0, 1, 2)), ((), ()))
    pairs = zip(_cut(x, size), _cut(g, size), strict=True)
    product = functools.partial(
        lax.dot_general,
        dimension_numbers=pixels,
        preferred_element_type=of_sums(x.dtype),
    )
    return jnp.stack([product(one, other) for one, other in pairs])


def _dot(x: Image, kernel: Matrix) -> Output:
    contracted = (((3,), (0,)), ((), ()))
    return lax.dot_general(
        x, kernel, contracted, preferred_element_type=of_sums(x.dtype)
    )


def _dot_by_group(x: Image, kernels: Float[Array, "g c d"], size: int) -> Image:
    """The product of each group with its own kernel.

    One product, of the input put at its group's place among zeros, which compilers for
    TPUs never write to memory.
    """
    b, h, w, _ = x.shape
    own = jnp.arange(b)[:, None] // size == jnp.arange(len(kernels))
    placed = x[:, :, :, None] * own[:, None, None, :, None].astype(x.dtype)
    return _dot(placed.reshape(b, h, w, -1), kernels.reshape(-1, kernels.shape[-1]))


# Of small matrices, in full precision.
_small = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def of_examples(groups: Statistics, size: int) -> Float[Array, "b 1 1 f"]:
    """What each example's group has, of groups of `size` consecutive examples."""
    return jnp.repeat(groups, size, axis=0)[:, None, None]
