"""What is computed in other ways on other platforms."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# `with known("tpu"):` says what the programs that are traced there will run on.
known = jax.make_user_context(None)


def by_platform(*arrays: jax.Array, cpu: Callable, default: Callable) -> Any:
    """`cpu(*arrays)` on CPUs and `default(*arrays)` elsewhere, of equal shapes.

    It is `lax.platform_dependent`, which traces both; where the platform is `known`,
    only what runs there is: a step is found in the compilation cache a sixth sooner.
    """
    if known.value is None:
        return lax.platform_dependent(*arrays, cpu=cpu, default=default)
    return (cpu if known.value == "cpu" else default)(*arrays)


def traced_once(function: Callable, **static: Any) -> Callable:
    """A function that is traced once for all its calls with equal shapes.

    Where the platform is `known` to be CPUs, programs call it; elsewhere it is inlined
    as it would be without this, since TPU programs with calls are other ones.

    Args:
      function: of arrays, and of what `static` names.
      static: `static_argnums` or `static_argnames`, of `jax.jit`.
    """
    called = jax.jit(function, **static)
    inlined = jax.jit(function, inline=True, **static)

    @functools.wraps(function)
    def traced(*args, **kwargs):
        return (called if known.value == "cpu" else inlined)(*args, **kwargs)

    return traced
