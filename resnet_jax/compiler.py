"""Options of XLA's compiler for the steps, on chips where some are known to be better.

`configs/compiler/CHIP.py` has those of a chip, and its README.md what was tried.
"""

import importlib

import jax

from resnet_jax.errors import UserError
from resnet_jax.plan.chips import chip_of_device

UNKNOWN = "No such compile option"


def options_for(device_kind: str) -> dict:
    """The options for devices that JAX calls so; none where none are known."""
    chip = chip_of_device(device_kind)
    try:
        return dict(importlib.import_module(f"configs.compiler.{chip}").OPTIONS)
    except ModuleNotFoundError:
        return {}


def compile_step(
    lowered: jax.stages.Lowered, device_kind: str, options: dict | str
) -> jax.stages.Compiled:
    """Compiles a step.

    Args:
      lowered: the step.
      device_kind: how JAX calls the devices.
      options: of the compiler, or `chip`: those of `options_for`.

    Raises:
      UserError: the compiler does not know an option.
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
