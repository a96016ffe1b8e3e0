"""Compiles a step with options of XLA's compiler that suit the chip.

`options.py` holds the options, `chips.py` the published figures of the chips, and
README.md what was tried.
"""

from typing import Any, Literal

import jax

from resnet_jax.compiler.chips import chip_of_device
from resnet_jax.compiler.options import OPTIONS
from resnet_jax.console import output
from resnet_jax.errors import UserError

# The message of the compiler about an unknown option.
UNKNOWN = "No such compile option"


def options_for(device_kind: str) -> dict[str, Any]:
    """Returns the compiler options of `options.py` for a kind of device.

    Args:
      device_kind: JAX's name for the devices, such as `TPU v5 lite`.

    Returns:
      The options by name; there are none for chips without an entry.
    """
    return dict(OPTIONS.get(chip_of_device(device_kind), {}))


def compile_step(
    lowered: jax.stages.Lowered,
    device_kind: str,
    options: dict[str, Any] | Literal["chip"],
) -> jax.stages.Compiled:
    """Compiles a step.

    Options of the chip that this compiler does not know are left out with a warning,
    since they make a step faster and do not change its results.

    Args:
      lowered: The step.
      device_kind: JAX's name for the devices.
      options: The compiler's options by name, or "chip" for those of `options_for`.

    Raises:
      UserError: The compiler does not know an option that the user chose.
    """
    chosen = options_for(device_kind) if isinstance(options, str) else dict(options)
    while True:
        try:
            return lowered.compile(compiler_options=chosen)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            unknown = [name for name in chosen if repr(name) in reason]
            if UNKNOWN not in reason:
                raise
            if not isinstance(options, str) or not unknown:
                raise UserError(
                    f"compiler_options={chosen} cannot be used. The compiler for"
                    f" {device_kind} reports: {reason}"
                ) from None
        for name in unknown:
            value = chosen.pop(name)
            if jax.process_index() == 0:
                output.warn(
                    f"The compiler for {device_kind} does not know the option"
                    f" {name}={value}. The step is compiled without it and may be"
                    " slower; a newer libtpu may know it."
                )
