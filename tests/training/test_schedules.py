"""Learning rates by step; tests/oracles/test_optim.py compares with torch and timm."""

import itertools

import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_jax.errors import UserError
from resnet_jax.training.schedules import Plateau, make_schedule
from tests.helpers.optim_configs import TRAIN_SIZE, about, configure


def rates(config: ConfigDict, steps, total_steps: int = 100) -> list[float]:
    """Returns the learning rates at some steps."""
    schedule = make_schedule(config, total_steps=total_steps, train_size=TRAIN_SIZE)
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize(
    ("batch_size", "learning_rate_batch", "peak"),
    [(256, 256, 0.1), (8192, 256, 3.2), (64, 256, 0.025), (8192, 0, 0.1)],
)
def test_the_peak_is_proportional_to_the_batch_size_or_fixed(
    batch_size, learning_rate_batch, peak
):
    config = configure(schedule="constant", learning_rate_batch=learning_rate_batch)
    config.batch_size = batch_size
    assert rates(config, [0, 50, 99]) == about([peak] * 3)


def test_a_cosine_leads_from_the_peak_to_zero():
    config = configure(schedule="cosine")
    expected = 0.1 * (1 + np.cos(np.pi * np.array([0, 25, 50, 99, 100]) / 100)) / 2
    assert rates(config, [0, 25, 50, 99, 100]) == about(expected.tolist())


def test_a_warm_up_is_linear_and_the_cosine_begins_after_it():
    config = configure(warmup={"steps": 20}, warmup_from=0.02)
    assert rates(config, [0, 5, 10, 20]) == about([0.02, 0.04, 0.06, 0.1])
    # Halfway through the 80 steps after the warm-up, and at the end.
    assert rates(config, [60, 100]) == about([0.05, 0.0])


@pytest.mark.parametrize(
    "decay_at",
    [
        ({"steps": 30}, {"steps": 60}),
        ({"epochs": 3}, {"epochs": 6}),
        ({"examples": 30 * 256}, {"examples": 60 * 256}),
        ({"percent": 30}, {"percent": 60}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_steps_decay_at_exactly_their_steps(decay_at, warmup):
    config = configure(schedule="step", decay_at=decay_at, warmup={"steps": warmup})
    got = rates(config, [5, 29, 30, 59, 60, 99])
    assert got == about([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_decays_at_the_same_step_multiply():
    config = configure(schedule="step", decay_at=({"steps": 30}, {"epochs": 3}))
    assert rates(config, [29, 30]) == about([0.1, 0.001])


def test_a_decay_during_the_warm_up_is_applied_after_it():
    config = configure(
        schedule="step",
        decay_at=({"steps": 10}, {"steps": 30}),
        warmup={"steps": 20},
    )
    assert rates(config, [10, 19, 20, 29, 30]) == about(
        [0.05, 0.095, 0.01, 0.01, 0.001]
    )


def test_a_warm_up_and_an_end_may_be_percentages_of_the_run():
    percent = configure(warmup={"percent": 20}, schedule_length={"percent": 100})
    steps = configure(warmup={"steps": 20}, schedule_length={"steps": 100})
    assert rates(percent, range(100)) == rates(steps, range(100))


def test_a_constant_rate_keeps_the_peak_after_the_warm_up():
    config = configure(schedule="constant", warmup={"epochs": 1})
    assert rates(config, [0, 5, 10, 99]) == about([0.0, 0.05, 0.1, 0.1])


@pytest.mark.parametrize("warmup", [100, 101])
def test_a_warm_up_as_long_as_the_run_is_an_error(warmup):
    config = configure(warmup={"steps": warmup})
    with pytest.raises(UserError, match=f"warmup takes {warmup} steps.*only 100"):
        rates(config, [0])


def test_an_unknown_schedule_is_an_error_that_names_the_nearest():
    with pytest.raises(UserError, match=r"schedule='cosin'.*Did you mean cosine\?"):
        rates(configure(schedule="cosin"), [0])


def test_a_malformed_decay_is_an_error_that_names_its_key():
    config = configure(schedule="step", decay_at=({"epoch": 30},))
    with pytest.raises(UserError, match=r"optim\.decay_at"):
        rates(config, [0])


def test_falling_schedules_end_at_the_end_learning_rate():
    for schedule in ("cosine", "polynomial", "triangular"):
        config = configure(schedule=schedule, end_learning_rate=0.01)
        assert rates(config, [0, 100]) == about([0.1, 0.01])


def test_a_polynomial_is_a_power_of_the_remaining_fraction():
    config = configure(schedule="polynomial", power=3.0, warmup={"steps": 20})
    assert rates(config, [10, 20, 60, 100]) == about([0.05, 0.1, 0.1 / 8, 0.0])


def test_a_triangle_has_straight_sides():
    config = configure(schedule="triangular", warmup={"steps": 20}, warmup_from=1e-5)
    got = rates(config, [0, 10, 20, 40, 60, 80, 99])
    assert got == about([1e-5, 0.050005, 0.1, 0.075, 0.05, 0.025, 0.00125])


def test_a_schedule_that_ends_early_stays_at_its_end():
    config = configure(
        warmup={"steps": 20},
        schedule_length=ConfigDict({"epochs": 6}),
        end_learning_rate=0.02,
    )
    # Halfway through the 40 steps after the warm-up.
    assert rates(config, [20, 40, 60, 99]) == about([0.1, 0.06, 0.02, 0.02])


def test_a_warm_up_may_replace_the_beginning_of_the_schedule():
    config = configure(warmup={"steps": 25}, warmup_prefix=False)
    full = configure()
    assert rates(config, [0, 5]) == about([0.0, 0.02])
    assert rates(config, [25, 50, 99]) == about(rates(full, [25, 50, 99]))


@pytest.mark.parametrize("train_size", [2560, 2500, 3001])
def test_a_rate_per_epoch_is_that_of_the_first_step(train_size):
    config = configure(warmup={"epochs": 2})
    args = {"total_steps": 100, "train_size": train_size}
    by_step = make_schedule(config, **args)
    config.optim.per_epoch = True
    by_epoch = make_schedule(config, **args)
    starts = [round(epoch * train_size / 256) for epoch in range(12)]
    for start, end in itertools.pairwise(starts):
        for step in range(start, min(end, 100)):
            assert float(by_epoch(step)) == float(by_step(start))
    assert len({float(by_epoch(step)) for step in range(100)}) > 7


def test_plateau_lowers_the_rate_after_more_than_patience_evaluations():
    plateau = Plateau(configure(schedule="plateau", patience=2).optim)
    memory, factors = None, []
    for top1 in (0.1, 0.3, 0.3, 0.2, 0.29, 0.31, 0.31, 0.3, 0.2, 0.1, 0.1, 0.1):
        memory = plateau.after(memory, top1)
        factors.append(memory["factor"])
    assert factors[:4] == [1.0] * 4
    assert factors[4:] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.01, 0.001])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "step"}, r"schedule=step needs optim\.decay_at"),
        (
            {"schedule": "step", "decay_at": ({"steps": 30}, {"epochs": 10})},
            r"decay_at=\{'epochs': 10\} is step 100, .*config\.total.* only 100",
        ),
        (
            {"schedule_length": ConfigDict({"steps": 9}), "warmup": {"steps": 9}},
            r"schedule_length takes 9 steps.*optim\.warmup \(9\)",
        ),
        (
            {"schedule_length": ConfigDict({"steps": 99})},
            r"schedule_length ends at step 99 .*config\.total.* 100",
        ),
        (
            {"schedule_length": ConfigDict({"steps": 99}), "schedule": "constant"},
            r"optim\.schedule=constant .*optim\.schedule_length",
        ),
    ],
)
def test_contradictions_are_errors_that_name_both_keys(changes, message):
    with pytest.raises(UserError, match=message):
        rates(configure(**changes), [0])
