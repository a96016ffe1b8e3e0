"""Parameters of layers."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp


def parameter(
    module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]
) -> jax.Array:
    """Returns the float32 parameter of a layer, and creates it if there is none.

    It is `module.param(name, init, shape, jnp.float32)`, which traces `init` in every
    call to check the shape of a parameter that exists already. Tracing initialisers is
    one in twenty of the Python calls until a train step is loaded from the compilation
    cache. Here the shapes are compared directly.

    Args:
      module: The layer.
      name: The name of the parameter in the layer.
      init: The initialiser, a function of a key, a shape and a dtype.
      shape: The shape of the parameter.

    Raises:
      flax.errors.ScopeParamShapeError: The parameter exists with another shape.
    """
    if module.has_variable("params", name):
        value = module.get_variable("params", name)
        if getattr(value, "shape", None) == shape:
            return value
    return module.param(name, init, shape, jnp.float32)
