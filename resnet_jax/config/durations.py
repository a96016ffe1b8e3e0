"""Durations: `{'epochs': 90}`, `{'steps': 500}`, `{'examples': 1e6}`, `{'percent': 5}`.

The last one is a percentage of the run, as in big_vision. A duration becomes a number
of steps here alone, and exactly: in floating-point numbers the third epoch of 1,000
images in batches of 30 would end just after step 100.
"""

import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ml_collections import ConfigDict

from resnet_jax.errors import UserError, shown

UNITS = ("steps", "epochs", "examples", "percent")
# Devices count the steps in int32.
MOST_STEPS = 2**31 - 1
# An amount is taken for a fraction with a denominator up to this one, if it is the
# number that such a fraction rounds to.
LARGEST_DENOMINATOR = 10**6


def parse(duration: Any, key: str) -> tuple[str, Fraction]:
    """Returns the unit and the exact amount of a duration.

    The amount is the fraction that its author meant: 1/10 for 0.1, and 1/11 for the
    number that 1 / 11 is in Python.

    Args:
      duration: The duration, such as `{'epochs': 90}`.
      key: The duration's key in the config, for messages.

    Raises:
      UserError: The duration does not have one unit and a finite number from 0 on.
    """
    is_dictionary = isinstance(duration, ConfigDict | Mapping)
    units = dict(duration) if is_dictionary else {}
    if len(units) != 1 or next(iter(units)) not in UNITS:
        raise UserError(
            f"{key}={shown(units if is_dictionary else duration)} is not a duration;"
            " write one of {'epochs': 90}, {'steps': 500}, {'examples': 1e6} or"
            " {'percent': 5}."
        )
    ((unit, amount),) = units.items()
    if key == "total" and unit == "percent":
        raise UserError(
            f"total.percent={shown(amount)} is a percentage of the run, whose length"
            " total sets; write it in epochs, steps or examples."
        )
    is_number = isinstance(amount, int | float) and not isinstance(amount, bool)
    # A checkpoint cannot record integers of thousands of digits.
    if not is_number or not 0 <= amount <= sys.float_info.max:
        raise UserError(
            f"{key}.{unit}={shown(amount)} is not a number of {unit} from 0 on."
        )
    if isinstance(amount, int):
        return unit, Fraction(amount)
    # numpy's float64 is a float with another repr.
    amount = float(amount)
    simple = Fraction(amount).limit_denominator(LARGEST_DENOMINATOR)
    return unit, simple if float(simple) == amount else Fraction(repr(amount))


def in_steps(
    duration: ConfigDict | Mapping,
    batch_size: int,
    train_size: int,
    key: str,
    total_steps: int | None = None,
) -> Fraction:
    """Returns a duration in steps, exactly; they need not be whole.

    Args:
      duration: The duration, such as `{'epochs': 90}`.
      batch_size: Images per step.
      train_size: The number of training images, the length of an epoch.
      key: The duration's key in the config, for messages.
      total_steps: The length of the run in steps, which every duration but `total`
        needs, since it may be a percentage of the run.

    Raises:
      UserError: The duration does not have one unit and a finite number from 0 on.
    """
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    unit, amount = parse(duration, key)
    if unit == "percent":
        assert total_steps is not None, f"{key} needs the length of the run"
        return amount * total_steps / 100
    images = {"steps": batch_size, "epochs": train_size, "examples": 1}
    return amount * images[unit] / batch_size


def to_steps(
    duration: ConfigDict | Mapping,
    batch_size: int,
    train_size: int,
    key: str,
    total_steps: int | None = None,
) -> int:
    """Returns a duration in whole steps: at least one, unless the duration is zero.

    Args:
      duration: The duration, such as `{'epochs': 90}`.
      batch_size: Images per step.
      train_size: The number of training images, the length of an epoch.
      key: The duration's key in the config, for messages.
      total_steps: The length of the run in steps; see `in_steps`.

    Raises:
      UserError: The duration does not have one unit and a finite number from 0 on, or
        it is longer than a run can be.
    """
    steps = in_steps(duration, batch_size, train_size, key, total_steps)
    if steps > MOST_STEPS:
        raise UserError(
            f"{key}={dict(duration)} is longer than the {MOST_STEPS:,} steps that a run"
            " can have."
        )
    return max(round(steps), 1 if steps else 0)


def is_due(step: int, every: Fraction) -> bool:
    """Returns whether something that recurs is due after a step.

    It is due at the first step at or after each multiple of `every`: with
    `{'epochs': 1}` after the first step by which another epoch is complete.

    Args:
      step: The number of steps so far.
      every: The result of `in_steps`; 0 is never due.
    """
    return every > 0 and step // every > (step - 1) // every
