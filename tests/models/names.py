"""Names of networks as parameters of tests."""

from collections.abc import Iterable

import pytest

from resnet_jax.models import ZOO, ResNetSpec


def deep_ones_slow(
    names: Iterable[str], largest: pytest.MarkDecorator = pytest.mark.slow
) -> list:
    """Marks the networks of more than 9 blocks or 12 million parameters as slow.

    Args:
      largest: of those of more than 36 blocks or 90 million parameters. They take half
        of the time of all, and differ from others in numbers only.
    """
    marked = []
    for name in names:
        marks = ()
        if _exceeds(name, 9, 12e6):
            marks = pytest.mark.slow
        if _exceeds(name, 36, 90e6):
            marks = largest
        marked.append(pytest.param(name, marks=marks))
    return marked


def _exceeds(name: str, most_blocks: int, most_parameters: float) -> bool:
    entry = ZOO[name]
    blocks = 0
    if isinstance(entry.spec, ResNetSpec):
        blocks = sum(entry.spec.stage_sizes)
    return blocks > most_blocks or entry.params > most_parameters
