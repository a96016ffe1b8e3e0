"""The cost of a network in multiply-adds, found by tracing and without running it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from flax import linen as nn


def init_shapes(model: nn.Module, image_size: int) -> dict:
    """Returns the shapes of a network's variables, without computing them.

    Args:
      model: The network.
      image_size: The side of its input in pixels.

    Returns:
      The collections `params` and `batch_stats` of `jax.ShapeDtypeStruct`.
    """
    return jax.eval_shape(model.init, jax.random.key(0), _image(model, image_size))


def count(tree: Any) -> int:
    """Returns the number of elements of all arrays of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a forward pass.

    Attributes:
      macs: The number of multiply-adds (MACs) of convolutions and matrix products.
      activations: The number of elements of the convolutions' outputs, as Radosavovic
        et al. 2020 (arXiv:2003.13678) count them.
    """

    macs: int = 0
    activations: int = 0

    def __add__(self, cost: "Cost") -> "Cost":
        return Cost(self.macs + cost.macs, self.activations + cost.activations)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.macs * times, self.activations * times)


def cost_of_image(model: nn.Module, image_size: int) -> Cost:
    """Returns the cost of one image's forward pass.

    Args:
      model: The network.
      image_size: The side of the image in pixels.

    Examples:
      >>> cost_of_image(resnet_jax.create_model("resnet18"), image_size=224)
      Cost(macs=1814073344, activations=2483712)
    """

    # One trace of both is faster than two. Initialisers add no convolution or product.
    def output(image: jax.Array) -> jax.Array:
        return model.init_with_output(jax.random.key(0), image)[0]

    return cost_of(output, _image(model, image_size))


def _image(model: nn.Module, size: int) -> jax.ShapeDtypeStruct:
    shape = (1, size, size, model.spec.in_channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def cost_of(function: Callable, *args: Any) -> Cost:
    """Returns the cost of `function(*args)`, of which only shapes are used."""
    return cost_of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def cost_of_jaxpr(jaxpr: jax.extend.core.Jaxpr) -> Cost:
    """Returns the cost of a traced function; a scan counts once per iteration."""
    total = Cost()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        output = math.prod(_shape(equation.outvars[0])) if equation.outvars else 0
        if name == "conv_general_dilated":
            kernel = _shape(equation.invars[1])
            out_features = equation.params["dimension_numbers"].rhs_spec[0]
            per_output = math.prod(kernel) // kernel[out_features]
            total += Cost(output * per_output, output)
        elif name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = _shape(equation.invars[0])
            total += Cost(output * math.prod(left[axis] for axis in contracted))
        else:
            times = equation.params["length"] if name == "scan" else 1
            for inner in inner_jaxprs(equation):
                total += cost_of_jaxpr(inner) * times
    return total


def _shape(atom: Any) -> tuple[int, ...]:
    # Tokens and references have no shape.
    return getattr(atom.aval, "shape", ())


def inner_jaxprs(equation: jax.extend.core.JaxprEqn) -> list[jax.extend.core.Jaxpr]:
    """Returns the functions inside of an equation.

    For a choice by platform, this is only the last branch, which is for all platforms
    without a branch of their own.
    """
    if equation.primitive.name == "cond":
        return [equation.params["branches"][-1].jaxpr]
    return list(jax.extend.core.jaxprs_in_params(equation.params))
