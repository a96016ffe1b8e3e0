"""Tests of the search for the largest batch that fits."""

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
    # The result is exact to the precision or to the unit, whichever is larger.
    assert fails - fits <= max(fits * PRECISION, 4) + 2
    assert fits % 4 == 0 and fails % 4 == 0
    assert len(tried) == len(set(tried)) <= 10


def test_the_largest_batch_of_a_network_that_never_fits_is_zero():
    assert largest(lambda number: (2000 + number, 1000), 128, 8) == (0, 8)


def test_the_search_bisects_if_the_compiler_does_not_give_the_amounts():
    def wanted(number: int) -> tuple[int, int]:
        return (100, 1000) if number <= 300 else (2000, 1000)

    fits, fails = largest(wanted, 1024, 8)
    assert fits <= 300 < fails
    assert fails - fits <= max(fits * PRECISION, 8)


@pytest.mark.parametrize(
    ("ghost_batch", "devices", "chips", "microbatches", "unit"),
    [
        # Ghost batches of 32 images are divided over eight chips.
        (32, 8, 8, 1, 4),
        (1, 8, 8, 1, 1),
        (32, 8, 8, 2, 8),
        # Each chip has two devices.
        (1, 8, 4, 1, 2),
        (32, 256, 256, 1, 1),
        # 24 images are divided over 16 chips; 48 is the first multiple of both.
        (24, 16, 16, 1, 3),
    ],
)
def test_all_multiples_of_the_unit_are_legal(
    ghost_batch, devices, chips, microbatches, unit
):
    assert unit_of(ghost_batch, devices, chips, microbatches) == unit
    batch = unit * chips
    assert batch % (ghost_batch * microbatches) == batch % (devices * microbatches) == 0
