"""Names of networks as parameters of tests."""

import re
from collections.abc import Iterable

import pytest


def deep_ones_slow(names: Iterable[str]) -> list:
    """Marks the networks of 100 layers and more as slow."""
    return [
        pytest.param(name, marks=pytest.mark.slow)
        if int(re.search(r"resnet(\d+)", name)[1]) >= 100
        else name
        for name in names
    ]
