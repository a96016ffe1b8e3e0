"""Names of networks as parameters of tests."""

from collections.abc import Iterable

import pytest

from resnet_jax.models import ZOO, ResNetSpec


def deep_ones_slow(names: Iterable[str]) -> list:
    """Marks the networks of 30 blocks or 30 million parameters and more as slow."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if _slow(name) else name
        for name in names
    ]


def _slow(name: str) -> bool:
    entry = ZOO[name]
    blocks = 0
    if isinstance(entry.spec, ResNetSpec):
        blocks = sum(entry.spec.stage_sizes)
    return blocks >= 30 or entry.params >= 30e6
