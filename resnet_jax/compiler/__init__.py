"""Compiling a step with the options of XLA's compiler that suit the chip.

`options.py` has the options, and README.md what was tried.
"""

import jax

from resnet_jax.compiler.chips import chip_of_device
from resnet_jax.compiler.options import OPTIONS
from resnet_jax.console import output
from resnet_jax.errors import UserError

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

    Options of the chip that this compiler does not know are left out with a warning:
    they make a step faster, and change no result.

    Raises:
      UserError: The compiler does not know an option that the user chose.
    """
    chosen = options_for(device_kind) if options == "chip" else dict(options)
    while True:
        try:
            return lowered.compile(compiler_options=chosen)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            unknown = [name for name in chosen if repr(name) in reason]
            if UNKNOWN not in reason:
                raise
            if options != "chip" or not unknown:
                raise UserError(
                    f"compiler_options={chosen}: the compiler for {device_kind} says:"
                    f" {reason}"
                ) from None
        for name in unknown:
            value = chosen.pop(name)
            if jax.process_index() == 0:
                output.warn(
                    f"The compiler for {device_kind} does not know the option"
                    f" {name}={value}. The step is compiled without it and may be"
                    " slower; a newer libtpu may know it."
                )
