"""Durations of the config in steps."""

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest

from resnet_jax.config.durations import MOST_STEPS, in_steps, is_due, parse, to_steps
from resnet_jax.errors import UserError

# Amounts as users write them, with the fractions that they mean.
AMOUNTS = {
    1: Fraction(1),
    0.1: Fraction(1, 10),
    2.5: Fraction(5, 2),
    90.5: Fraction(181, 2),
    0.01: Fraction(1, 100),
    1.7: Fraction(17, 10),
    1 / 3: Fraction(1, 3),
    1 / 11: Fraction(1, 11),
    0.123456789: Fraction(123456789, 10**9),
    1e6: Fraction(10**6),
}


def steps_due(duration: dict, batch_size: int, size: int, last: int) -> list[int]:
    every = in_steps(duration, batch_size, size, "every")
    return [step for step in range(1, last + 1) if is_due(step, every)]


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
    ("size", "batch_size", "ends"),
    [
        (1000, 64, [16, 32, 47, 63, 79, 94, 110, 125]),
        # In floating-point numbers 100 / (1000 / 30) is less than 3.
        (1000, 30, [34, 67, 100, 134, 167, 200]),
        (10, 3, [4, 7, 10, 14]),
        (50, 49, [2, 3, 4, 5]),
        # Several epochs in a step.
        (3, 8, [1, 2, 3, 4]),
    ],
)
def test_an_epoch_ends_with_the_first_step_by_which_it_is_complete(
    size, batch_size, ends
):
    assert steps_due({"epochs": 1}, batch_size, size, ends[-1]) == ends


@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_what_recurs_comes_exactly_at_its_multiples(amount):
    draw = random.Random(str(amount))
    for _ in range(60):
        size, batch_size = draw.randrange(1, 3000), draw.randrange(1, 200)
        every = AMOUNTS[amount] * size / batch_size
        last = 400
        expected = {
            -(-number * every.numerator // every.denominator)
            for number in range(1, int(last / every) + 1)
        }
        got = steps_due({"epochs": amount}, batch_size, size, last)
        assert got == sorted(step for step in expected if step <= last)


def test_a_run_ends_with_the_last_of_its_epochs_if_these_are_whole_steps():
    for size, batch_size, epochs in itertools.product(
        (50_000, 60_000, 999, 1437), (1, 3, 9, 50), (1, 3, 7, 90)
    ):
        if size % batch_size == 0:
            total = to_steps({"epochs": epochs}, batch_size, size, "total")
            due = steps_due({"epochs": 1}, batch_size, size, min(total, 2000))
            assert total == epochs * size // batch_size
            assert (
                due
                == list(range(size // batch_size, min(total, 2000) + 1))[
                    :: size // batch_size
                ]
            )


@pytest.mark.parametrize(
    ("amount", "size", "batch_size", "steps"),
    [
        # 0.1 x 3 x 10 images, for instance, is 3 steps and not 3.0000000000000004.
        (0.1, 30, 2, Fraction(3, 2)),
        (0.3, 10, 1, 3),
        (0.7, 1281167, 1024, Fraction(7 * 1281167, 10240)),
        (90.5, 1281167, 1000, Fraction(181 * 1281167, 2000)),
        (np.float64(0.1), 100, 10, 1),
    ],
)
def test_a_decimal_fraction_is_exact(amount, size, batch_size, steps):
    assert in_steps({"epochs": amount}, batch_size, size, "every") == steps


def test_a_duration_is_rounded_to_the_nearest_step():
    # 90 epochs of ImageNet are 112,602.6 steps of 1,024 images.
    assert to_steps({"epochs": 90}, 1024, 1281167, "total") == 112_603
    assert to_steps({"epochs": 0.29}, 1, 100, "total") == 29
    assert to_steps({"epochs": 1.15}, 10, 100, "total") == 12  # 11.5, to even


@pytest.mark.parametrize(
    ("percent", "total", "steps"),
    [
        (10, 300, 30),
        (5, 559, 28),
        (0.1, 300, 1),
        (0, 300, 0),
        (100, 7, 7),
        (29, 100, 29),
    ],
)
def test_a_percentage_is_of_the_steps_of_the_run(percent, total, steps):
    # The number of images and of those in a step are without effect.
    for batch_size, size in ((32, 12), (1, 10**6)):
        duration = {"percent": percent}
        assert to_steps(duration, batch_size, size, "optim.warmup", total) == steps


def test_what_recurs_by_percent_comes_as_often_in_runs_of_any_length():
    for total in (20, 21, 99, 300, 559, 20_000):
        every = in_steps({"percent": 5}, 32, 894, "evaluate.every", total)
        due = [step for step in range(1, total + 1) if is_due(step, every)]
        assert len(due) == 20
        assert due[-1] == total
    every = in_steps({"percent": 5}, 32, 12, "evaluate.every", 3)
    assert [is_due(step, every) for step in (1, 2, 3)] == [True] * 3


def test_the_length_of_a_run_cannot_be_a_percentage_of_itself():
    with pytest.raises(
        UserError, match=r"^total\.percent=10 is a percentage of the ru"
    ):
        to_steps({"percent": 10}, 32, 100, "total")


def test_more_often_than_each_step_is_each_step_and_zero_is_never():
    assert steps_due({"epochs": 0.001}, 10, 100, 5) == [1, 2, 3, 4, 5]
    assert steps_due({"steps": 0}, 10, 100, 50) == []
    assert steps_due({"examples": 1e30}, 10, 100, 50) == []


@pytest.mark.parametrize(
    "duration",
    [
        *({}, {"days": 3}, {"steps": 1, "epochs": 1}, {"steps": "many"}),
        *({"steps": -1}, {"epochs": float("nan")}, {"epochs": float("inf")}),
        *({"epochs": True}, {"epochs": None}, {"epochs": "1"}, {"epochs": [1]}),
        *(None, 90, "90", [90], {"steps": np.int64(3)}),
    ],
    ids=str,
)
def test_a_malformed_duration_is_an_error_that_names_its_key(duration):
    with pytest.raises(UserError, match=r"^total[.=].* is not a "):
        parse(duration, "total")


@pytest.mark.parametrize("duration", [{"steps": MOST_STEPS + 1}, {"epochs": 1e300}])
def test_a_duration_longer_than_a_run_can_be_is_an_error(duration):
    with pytest.raises(UserError, match=r"total=\{.*is longer than the 2,147,483,647"):
        to_steps(duration, 100, 1000, "total")
    assert to_steps({"steps": MOST_STEPS}, 100, 1000, "total") == MOST_STEPS
