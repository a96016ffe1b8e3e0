"""What a network costs, known without running it."""

import math
from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp
from flax import linen as nn


def init_shapes(model: nn.Module, image_size: int) -> dict:
    """Shapes of the network's variables: `params` and `batch_stats`."""
    image = jnp.zeros((1, image_size, image_size, model.spec.in_channels))
    return jax.eval_shape(model.init, jax.random.key(0), image)


def count(tree) -> int:
    """Number of elements of all arrays of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_macs(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of convolutions and products of one image's forward pass."""
    image = jax.ShapeDtypeStruct(
        (1, image_size, image_size, model.spec.in_channels), jnp.float32
    )
    return macs_of(model.apply, init_shapes(model, image_size), image)


def macs_of(function: Callable, *args) -> int:
    """Multiply-adds of the convolutions and products that `function(*args)` traces."""
    return _macs_of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _macs_of_jaxpr(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_features = equation.params["dimension_numbers"].rhs_spec[0]
            per_output = math.prod(kernel) // kernel[out_features]
            total += math.prod(equation.outvars[0].aval.shape) * per_output
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            per_output = math.prod(left[axis] for axis in contracted)
            total += math.prod(equation.outvars[0].aval.shape) * per_output
        else:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                total += _macs_of_jaxpr(inner)
    return total
