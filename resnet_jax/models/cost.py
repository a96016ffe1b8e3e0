"""What a network costs, known without running it."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.extend.core
import jax.numpy as jnp
from flax import linen as nn


def init_shapes(model: nn.Module, image_size: int) -> dict:
    """Shapes of the network's variables: `params` and `batch_stats`."""
    return jax.eval_shape(model.init, jax.random.key(0), _image(model, image_size))


def count(tree) -> int:
    """Number of elements of all arrays of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a forward pass takes.

    Attributes:
      macs: multiply-adds of the convolutions and products.
      activations: elements of the convolutions' outputs, as Radosavovic et al. 2020
        (arXiv:2003.13678) count them.
    """

    macs: int = 0
    activations: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.macs + other.macs, self.activations + other.activations)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.macs * times, self.activations * times)


def cost_of_image(model: nn.Module, image_size: int) -> Cost:
    """The cost of one image's forward pass."""

    # Initialisers convolve nothing, and one trace is faster than two.
    def output(image):
        return model.init_with_output(jax.random.key(0), image)[0]

    return cost_of(output, _image(model, image_size))


def _image(model: nn.Module, size: int) -> jax.ShapeDtypeStruct:
    shape = (1, size, size, model.spec.in_channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def cost_of(function: Callable, *args) -> Cost:
    """The cost of what `function(*args)` traces."""
    return cost_of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def cost_of_jaxpr(jaxpr: jax.extend.core.Jaxpr) -> Cost:
    """The cost of what was traced."""
    total = Cost()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        output = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            out_features = equation.params["dimension_numbers"].rhs_spec[0]
            per_output = math.prod(kernel) // kernel[out_features]
            total += Cost(output * per_output, output)
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += Cost(output * math.prod(left[axis] for axis in contracted))
        else:
            times = equation.params["length"] if name == "scan" else 1
            for inner in inner_jaxprs(equation):
                total += cost_of_jaxpr(inner) * times
    return total


def inner_jaxprs(equation: jax.extend.core.JaxprEqn) -> list[jax.extend.core.Jaxpr]:
    """The functions inside of an equation; of those for each platform, the last."""
    if equation.primitive.name == "cond":
        return [equation.params["branches"][-1].jaxpr]
    return list(jax.extend.core.jaxprs_in_params(equation.params))
