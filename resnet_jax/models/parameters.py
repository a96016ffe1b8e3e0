"""Parameters of layers."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import ArrayLike


def parameter(
    module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]
) -> ArrayLike:
    """The float32 parameter of a layer: `module.param(name, init, shape, float32)`.

    That one traces `init` to see whether a parameter that is there has its shape: one
    in twenty of Python's calls until a step is loaded from the compilation cache. Here
    the two shapes are compared.
    """
    there = module.has_variable("params", name)
    value = module.get_variable("params", name) if there else None
    if getattr(value, "shape", None) == shape:
        return value
    return module.param(name, init, shape, jnp.float32)
