"""Implementations for all platforms are traced unless the platform is known."""

import functools

import jax
import numpy as np
import pytest

from resnet_jax.kernels.platforms import by_platform, target_platform, traced_once
from resnet_jax.training import programs
from tests.helpers import tiny


def make_choice(traced: list[str]):
    """Makes a jitted choice by platform that notes what is traced."""

    def cpu(x):
        traced.append("cpu")
        return x + 1

    def default(x):
        traced.append("default")
        return x - 1

    return jax.jit(lambda x: by_platform(x, cpu=cpu, default=default))


def test_both_are_traced_and_the_devices_choose_if_no_platform_is_known():
    traced = []
    assert make_choice(traced)(1.0) == (2.0 if jax.default_backend() == "cpu" else 0.0)
    assert set(traced) == {"cpu", "default"}


@pytest.mark.parametrize(
    ("platform", "implementation", "result"),
    [("cpu", "cpu", 2.0), ("tpu", "default", 0.0), ("gpu", "default", 0.0)],
)
def test_only_the_implementation_of_a_known_platform_is_traced(
    platform, implementation, result
):
    traced = []
    with target_platform(platform):
        assert make_choice(traced)(1.0) == result
    assert traced == [implementation]


def test_a_program_traced_for_one_platform_is_not_used_for_another():
    traced = []
    choice = make_choice(traced)
    with target_platform("cpu"):
        choice(1.0)
        with target_platform("tpu"):
            assert choice(1.0) == 0.0
        assert choice(1.0) == 2.0
    assert traced == ["cpu", "default"]
    choice(1.0)
    assert traced[2:] and target_platform.value is None


@pytest.mark.parametrize(
    ("platform", "called"), [("cpu", True), ("tpu", False), ("gpu", False)]
)
def test_a_function_traced_once_is_called_on_cpus_and_inlined_elsewhere(
    platform, called
):
    traced = []

    @functools.partial(traced_once, static_argnames="step")
    def plus(x, *, step):
        traced.append(step)
        return x + step

    def program(x):
        return plus(plus(plus(x, step=1.0), step=2.0), step=1.0)

    with target_platform(platform):
        lowered = jax.jit(program).lower(1.0)
    assert traced == [1.0, 2.0]
    assert ("call @plus" in lowered.as_text()) == called
    assert lowered.compile()(1.0) == 5.0


@pytest.mark.slow
def test_a_train_step_for_a_known_platform_equals_one_for_any_platform():
    setup = tiny.setup()
    batch = setup.to_devices(tiny.batch(setup))
    got = programs.lower_train_step(setup).compile()(tiny.state(setup), batch)
    both_traced = programs.jit_train_step(setup, distills=False).lower(
        programs.state_like(setup), programs.train_batch_like(setup)
    )
    expected = both_traced.compile()(tiny.state(setup), batch)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
