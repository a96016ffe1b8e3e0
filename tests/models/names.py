"""Names of networks as parameters of tests."""

import dataclasses
from collections.abc import Iterable

import pytest

from resnet_jax.models import ZOO, ResNetSpec
from resnet_jax.models.zoo import Spec


def deep_ones_slow(names: Iterable[str]) -> list:
    """Marks the networks of more than 9 blocks or 12 million parameters as slow."""
    return [_param(name, pytest.mark.slow if _is_large(name) else ()) for name in names]


def one_of_each_kind(names: Iterable[str]) -> list:
    """Does so, and marks all but the smallest network of each kind as long.

    Networks of a kind differ in depths, widths and other numbers only.
    """
    kinds: dict[tuple, list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(ZOO[name].spec), []).append(name)
    marked = []
    for kind in kinds.values():
        smallest, *others = sorted(kind, key=lambda name: ZOO[name].params)
        marked += deep_ones_slow([smallest])
        marked += [_param(name, pytest.mark.long) for name in others]
    return marked


def _param(name: str, marks):
    return pytest.param(name, marks=marks)


def _is_large(name: str) -> bool:
    entry = ZOO[name]
    is_deep = isinstance(entry.spec, ResNetSpec) and sum(entry.spec.stage_sizes) > 9
    return is_deep or entry.params > 12e6


def _kind(spec: Spec) -> tuple:
    """What is no number in a spec, and which numbers are 0, 1 or more."""

    def kind_of(value):
        if isinstance(value, tuple):
            return tuple(sorted({item for item in value if isinstance(item, str)}))
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        return min(value, 2)

    fields = dataclasses.fields(spec)
    return type(spec), *(kind_of(getattr(spec, field.name)) for field in fields)
