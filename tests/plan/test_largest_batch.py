"""The search for the largest batch that fits."""

import pytest

from resnet_jax.plan.largest_batch import PRECISION, largest, unit_of


@pytest.mark.parametrize("start", [8, 128, 100_000])
@pytest.mark.parametrize(
    ("fixed", "each", "limit"), [(100, 7.0, 2000), (0, 0.01, 1600), (1590, 0.5, 1600)]
)
def test_the_largest_batch_is_found_in_few_tries(start, fixed, each, limit):
    tried = []

    def wanted(number: int) -> tuple[int, int]:
        tried.append(number)
        return round(fixed + each * number), limit

    fits, fails = largest(wanted, start, 4)
    most = (limit - fixed) / each
    assert fits <= most + 1 / each and fails >= most - 1 / each
    # To the precision, or to the unit.
    assert fails - fits <= max(fits * PRECISION, 4) + 2
    assert fits % 4 == 0 and fails % 4 == 0
    assert len(tried) == len(set(tried)) <= 10


def test_a_network_that_never_fits_gives_none():
    assert largest(lambda number: (2000 + number, 1000), 128, 8) == (0, 8)


def test_where_compilers_do_not_tell_how_much_the_search_halves():
    def wanted(number: int) -> tuple[int, int]:
        return (100, 1000) if number <= 300 else (2000, 1000)

    fits, fails = largest(wanted, 1024, 8)
    assert fits <= 300 < fails
    assert fails - fits <= max(fits * PRECISION, 8)


@pytest.mark.parametrize(
    ("groups", "devices", "chips", "microbatches", "unit"),
    [
        # 32 images are divided over eight chips.
        (32, 8, 8, 1, 4),
        (1, 8, 8, 1, 1),
        (32, 8, 8, 2, 8),
        # Two devices a chip.
        (1, 8, 4, 1, 2),
        (32, 256, 256, 1, 1),
        # 24 images over 16 chips: 48 are the first that both divide.
        (24, 16, 16, 1, 3),
    ],
)
def test_all_multiples_of_the_unit_are_legal(
    groups, devices, chips, microbatches, unit
):
    assert unit_of(groups, devices, chips, microbatches) == unit
    batch = unit * chips
    assert batch % (groups * microbatches) == batch % (devices * microbatches) == 0
