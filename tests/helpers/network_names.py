"""Makes parameters of tests from names of networks, and marks the slow ones."""

import dataclasses
from collections.abc import Iterable

import pytest

from resnet_jax.models import ZOO, ResNetSpec
from resnet_jax.models.zoo import Spec


def deep_ones_slow(
    names: Iterable[str], largest: pytest.MarkDecorator = pytest.mark.slow
) -> list:
    """Marks the networks of more than 9 blocks or 12 million parameters as slow.

    Args:
      names: The names of the networks.
      largest: The mark of networks larger than ResNet-50: more than 16 blocks or 50
        million parameters.
    """
    marked = []
    for name in names:
        marks = pytest.mark.slow if _exceeds(name, 9, 12e6) else ()
        marks = largest if _exceeds(name, 16, 50e6) else marks
        marked.append(pytest.param(name, marks=marks))
    return marked


def one_of_each_kind(names: Iterable[str]) -> list:
    """Marks all networks as long but the smallest of each kind.

    Networks of a kind differ only in depths, widths and other numbers. The smallest
    ones are marked by `deep_ones_slow`.
    """
    kinds: dict[tuple, list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(ZOO[name].spec), []).append(name)
    marked = []
    for kind in kinds.values():
        smallest, *others = sorted(kind, key=lambda name: ZOO[name].params)
        marked += deep_ones_slow([smallest])
        marked += [pytest.param(name, marks=pytest.mark.long) for name in others]
    return marked


def _exceeds(name: str, most_blocks: int, most_parameters: float) -> bool:
    entry = ZOO[name]
    blocks = 0
    if isinstance(entry.spec, ResNetSpec):
        blocks = sum(entry.spec.stage_sizes)
    return blocks > most_blocks or entry.params > most_parameters


def _kind(spec: Spec) -> tuple:
    """Returns a spec's options; numbers above 2 count as equal."""

    def kind_of(value):
        if isinstance(value, tuple):
            return tuple(sorted({item for item in value if isinstance(item, str)}))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        return min(value, 2)

    fields = dataclasses.fields(spec)
    return type(spec), *(kind_of(getattr(spec, field.name)) for field in fields)
