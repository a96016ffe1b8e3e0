"""Configs of optimisers and schedules for short runs, for the tests of both."""

from typing import Any

import pytest
from ml_collections import ConfigDict

from resnet_jax.config import defaults

# An epoch has ten steps at the batch size of `configure`.
TRAIN_SIZE = 2560


def configure(**optim: Any) -> ConfigDict:
    """Returns the defaults without warm-up, with changes of `optim` by key."""
    config = defaults.get_config()
    config.batch_size = 256
    config.optim.warmup = ConfigDict({"steps": 0})
    with config.ignore_type():
        for key, value in optim.items():
            config.optim[key] = ConfigDict(value) if key == "warmup" else value
    return config


def about(values: Any) -> Any:
    """Returns a value that equals `values` up to a few float32 operations."""
    # Each rounds by 2^-24 of the peak.
    return pytest.approx(values, rel=1e-6, abs=1e-7)
