"""Durations: `{'epochs': 90}`, `{'steps': 500}` or `{'examples': 1e6}`."""

import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from resnet_jax.errors import UserError

UNITS = ("steps", "epochs", "examples")


def in_steps(
    duration: ConfigDict | Mapping, batch_size: int, train_size: int, key: str
) -> float:
    """Returns a duration in steps, which need not be whole.

    Args:
      duration: The duration, such as `{'epochs': 90}`.
      batch_size: Images per step.
      train_size: The number of training images, the length of an epoch.
      key: The duration's key in the config, for messages.

    Raises:
      UserError: The duration does not have one unit and a finite number from 0 on.
    """
    units = dict(duration)
    if len(units) != 1 or next(iter(units)) not in UNITS:
        raise UserError(
            f"{key}={units} is not a duration; write one of {{'epochs': 90}},"
            " {'steps': 500} or {'examples': 1e6}."
        )
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    ((unit, amount),) = units.items()
    if not isinstance(amount, int | float) or not 0 <= amount < math.inf:
        raise UserError(f"{key}.{unit}={amount!r} is not a number of {unit}.")
    scale = {"steps": 1, "epochs": train_size / batch_size, "examples": 1 / batch_size}
    return float(amount * scale[unit])


def to_steps(
    duration: ConfigDict | Mapping, batch_size: int, train_size: int, key: str
) -> int:
    """Returns a duration in whole steps: at least one, unless the duration is zero.

    Args:
      duration: The duration, such as `{'epochs': 90}`.
      batch_size: Images per step.
      train_size: The number of training images, the length of an epoch.
      key: The duration's key in the config, for messages.

    Raises:
      UserError: The duration does not have one unit and a finite number from 0 on.
    """
    steps = in_steps(duration, batch_size, train_size, key)
    return max(round(steps), 1 if steps else 0)
