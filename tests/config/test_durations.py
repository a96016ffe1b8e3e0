"""Durations of the config in steps."""

import pytest

from resnet_jax.config.durations import to_steps
from resnet_jax.errors import UserError


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ({"steps": 7}, 7),
        ({"epochs": 2}, 20),
        ({"epochs": 0.25}, 2),
        ({"examples": 1000}, 10),
        ({"examples": 1}, 1),
        ({"epochs": 0}, 0),
    ],
)
def test_durations_become_steps(duration, steps):
    assert to_steps(duration, 100, 1000, "total") == steps


@pytest.mark.parametrize(
    "duration", [{}, {"days": 3}, {"steps": 1, "epochs": 1}, {"steps": "many"}]
)
def test_a_malformed_duration_is_an_error_that_names_its_key(duration):
    with pytest.raises(UserError, match="total"):
        to_steps(duration, 100, 1000, "total")
