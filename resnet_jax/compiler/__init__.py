"""Compiling a step with the options of XLA's compiler that suit the chip.

`options.py` has the options, and README.md what was tried.
"""

import jax

from resnet_jax.compiler.options import OPTIONS
from resnet_jax.errors import UserError
from resnet_jax.plan.chips import chip_of_device

UNKNOWN = "No such compile option"


def options_for(device_kind: str) -> dict:
    """Returns the options for devices of a kind; none for chips that have no entry."""
    return dict(OPTIONS.get(chip_of_device(device_kind), {}))


def compile_step(
    lowered: jax.stages.Lowered, device_kind: str, options: dict | str
) -> jax.stages.Compiled:
    """Compiles a step.

    Args:
      lowered: The step.
      device_kind: JAX's name for the devices.
      options: The compiler's options, or `chip` for those of `options_for`.

    Raises:
      UserError: The compiler does not know an option.
    """
    if options == "chip":
        options = options_for(device_kind)
    try:
        return lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if UNKNOWN not in str(error):
            raise
        raise UserError(
            f"compiler_options={dict(options)}: the compiler for {device_kind} says:"
            f" {str(error).splitlines()[0]}"
        ) from None
