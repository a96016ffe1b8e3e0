"""Compiler options of the chip and of the config."""

import jax
import pytest

from resnet_jax import compiler
from resnet_jax.errors import UserError
from resnet_jax.training import programs
from tests.helpers import tiny


def lowered():
    """Returns a lowered program that adds 1."""
    return jax.jit(lambda x: x + 1).lower(1.0)


def test_a_chip_has_the_options_of_the_table():
    options = compiler.options_for("TPU v5 lite")
    assert options["xla_tpu_scoped_vmem_limit_kib"] == 49152


def test_devices_without_an_entry_have_no_options():
    assert compiler.options_for("cpu") == {}
    assert compiler.compile_step(lowered(), "cpu", "chip")(1.0) == 2


def test_options_of_a_chip_that_the_compiler_does_not_know_are_warnings(capsys):
    # The compiler for CPUs does not know the options for TPUs.
    assert compiler.compile_step(lowered(), "TPU v5 lite", "chip")(1.0) == 2
    text = capsys.readouterr().err
    for name in compiler.options_for("TPU v5 lite"):
        assert text.count(f"does not know the option {name}=") == 1


def test_options_of_the_config_are_passed_to_the_compiler():
    changes = {"compiler_options": {"xla_no_such_option": 1}}
    with pytest.raises(UserError, match=r"compiler_options=.*'xla_no_such_option'"):
        programs.compile_train_step(tiny.setup(changes))
