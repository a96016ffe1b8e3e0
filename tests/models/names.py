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


def without_the_largest(names: Iterable[str]) -> list[str]:
    """Leaves out the networks of more than 36 blocks or 90 million parameters.

    They take half of the time of all, and differ from others in numbers only.
    """
    return [name for name in names if not _exceeds(name, 36, 90e6)]


def _slow(name: str) -> bool:
    return _exceeds(name, 9, 12e6)


def _exceeds(name: str, most_blocks: int, most_parameters: float) -> bool:
    entry = ZOO[name]
    blocks = 0
    if isinstance(entry.spec, ResNetSpec):
        blocks = sum(entry.spec.stage_sizes)
    return blocks > most_blocks or entry.params > most_parameters
