"""Names of networks as parameters of tests."""

from collections.abc import Iterable

import pytest

from resnet_jax.models import ZOO, ResNetSpec


def deep_ones_slow(names: Iterable[str]) -> list:
    """Marks the networks of more than 9 blocks or 12 million parameters as slow."""
    return [
        pytest.param(name, marks=pytest.mark.slow) if _slow(name) else name
        for name in names
    ]


def _slow(name: str) -> bool:
    entry = ZOO[name]
    blocks = 0
    if isinstance(entry.spec, ResNetSpec):
        blocks = sum(entry.spec.stage_sizes)
    return blocks > 9 or entry.params > 12e6
