"""Types and shapes of the arrays that kernels take."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Image = Float[Array, "b h w c"]
# A kernel with i input channels for each of its f outputs.
Kernel = Float[Array, "k k i f"]
Output = Float[Array, "b h2 w2 f"]
Shape = jax.ShapeDtypeStruct


def accumulation_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the type in which values of a type are added: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def shape_like(array: Array, shape: tuple[int, ...]) -> Shape:
    """Returns a shape with the dtype and the manual axes of an array.

    Inside of `jax.shard_map`, JAX checks over which axes of the mesh an array varies.
    """
    aval = jax.typeof(array)
    return Shape(
        shape,
        aval.dtype,
        sharding=aval.sharding.update(spec=P(*[None] * len(shape))),
        manual_axis_type=aval.manual_axis_type,
    )
