"""Dispatch to platform-specific implementations, and the switch that turns it off.

`by_platform` dispatches, `target_platform` and `fused_over` say for which devices a
program is traced, and `plain_operations` is the switch.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax

# `with target_platform("tpu"):` names the platform for which programs are traced inside
# of the context; None if it is not known. JAX includes the values of these contexts in
# the keys of its caches of traced and compiled functions.
target_platform = jax.make_user_context(None)
# `with fused_over(mesh):` fuses 1x1 convolutions with their batch norm in training, for
# batches that are sharded over the mesh, where `kernels/tpu/norm.py` supports it.
fused_over = jax.make_user_context(None)
_plain = jax.make_user_context(False)


@contextlib.contextmanager
def plain_operations() -> Iterator[None]:
    """Turns the kernels off in all programs that are traced inside of the context.

    There, convolutions are `lax.conv_general_dilated`, batch norm is written as its
    definition and differentiated by JAX, and max pooling is `lax.reduce_window`, on all
    platforms. Convolutions are never fused with their batch norm, and oneDNN is not
    used. Results are equal up to rounding. The switch suits programs that other tools
    read, such as exported ones, and comparisons with the kernels.

    A jitted function is traced again inside of the context, since JAX's caches keep
    programs with and without kernels apart. Programs that were lowered or compiled
    before keep their kernels.

    Examples:
        >>> network = resnet_jax.create_model("resnet18")
        >>> image = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
        >>> variables = jax.eval_shape(network.init, jax.random.key(0), image)
        >>> with resnet_jax.kernels.plain_operations():
        ...     exported = jax.export.export(jax.jit(network.apply))(variables, image)
        >>> exported.mlir_module().count("stablehlo.convolution")
        20
    """
    with _plain(True):
        yield


def is_plain() -> bool:
    """Returns whether `plain_operations` is active."""
    return _plain.value


def by_platform(*arrays: jax.Array, cpu: Callable, default: Callable) -> Any:
    """Returns `cpu(*arrays)` on CPUs and `default(*arrays)` elsewhere.

    `lax.platform_dependent` does that, but traces both functions. If `target_platform`
    names the platform, only its function is traced, so that a train step is found in
    the compilation cache a sixth sooner. Inside of `plain_operations` only `default` is
    traced.

    Args:
      *arrays: The arguments of both functions.
      cpu: The function for CPUs.
      default: The function for all other platforms; its results must have the shapes
        and dtypes of those of `cpu`.
    """
    if is_plain():
        return default(*arrays)
    if target_platform.value is None:
        return lax.platform_dependent(*arrays, cpu=cpu, default=default)
    return (cpu if target_platform.value == "cpu" else default)(*arrays)


def traced_once(function: Callable, **static: Any) -> Callable:
    """Makes a function that is traced once for all its calls with equal shapes.

    If `target_platform` is "cpu", programs call the function. Otherwise it is inlined,
    since TPU programs with calls are compiled to other programs.

    Args:
      function: A function of arrays, and of the arguments that `static` names.
      **static: `static_argnums` or `static_argnames` of `jax.jit`.
    """
    called = jax.jit(function, **static)
    inlined = jax.jit(function, inline=True, **static)

    @functools.wraps(function)
    def traced(*args, **kwargs):
        return (called if target_platform.value == "cpu" else inlined)(*args, **kwargs)

    return traced
