"""Both ways are traced unless the platform is known; then that of it alone is."""

import functools

import jax
import numpy as np
import pytest

from resnet_jax.kernels.platforms import by_platform, known, traced_once
from resnet_jax.training import programs
from tests.helpers import tiny


def either(traced: list[str]):
    """A jitted choice that notes what of it is traced."""

    def cpu(x):
        traced.append("cpu")
        return x + 1

    def default(x):
        traced.append("default")
        return x - 1

    return jax.jit(lambda x: by_platform(x, cpu=cpu, default=default))


def test_where_no_platform_is_known_both_are_traced_and_the_devices_choose():
    traced = []
    assert either(traced)(1.0) == (2.0 if jax.default_backend() == "cpu" else 0.0)
    assert set(traced) == {"cpu", "default"}


@pytest.mark.parametrize(
    ("platform", "way", "result"),
    [("cpu", "cpu", 2.0), ("tpu", "default", 0.0), ("gpu", "default", 0.0)],
)
def test_of_a_known_platform_only_its_way_is_traced(platform, way, result):
    traced = []
    with known(platform):
        assert either(traced)(1.0) == result
    assert traced == [way]


def test_what_was_traced_for_one_platform_is_not_taken_for_another():
    traced = []
    choice = either(traced)
    with known("cpu"):
        choice(1.0)
        with known("tpu"):
            assert choice(1.0) == 0.0
        assert choice(1.0) == 2.0
    assert traced == ["cpu", "default"]
    choice(1.0)
    assert traced[2:] and known.value is None


@pytest.mark.parametrize(
    ("platform", "called"), [("cpu", True), ("tpu", False), ("gpu", False)]
)
def test_what_is_traced_once_is_called_on_cpus_and_inlined_elsewhere(platform, called):
    traced = []

    @functools.partial(traced_once, static_argnames="by")
    def plus(x, *, by):
        traced.append(by)
        return x + by

    def program(x):
        return plus(plus(plus(x, by=1.0), by=2.0), by=1.0)

    with known(platform):
        lowered = jax.jit(program).lower(1.0)
    assert traced == [1.0, 2.0]
    assert ("call @plus" in lowered.as_text()) == called
    assert lowered.compile()(1.0) == 5.0


@pytest.mark.slow
def test_the_train_step_of_a_setup_is_that_of_a_network_on_an_unknown_platform():
    setup = tiny.setup()
    batch = setup.to_devices(tiny.batch(setup))
    found = programs.lower_train_step(setup).compile()(tiny.state(setup), batch)
    both_traced = programs.jit_train_step(setup, distills=False).lower(
        programs.state_like(setup), programs.train_batch_like(setup)
    )
    expected = both_traced.compile()(tiny.state(setup), batch)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
