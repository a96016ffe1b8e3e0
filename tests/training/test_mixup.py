"""Mixup and CutMix: the random numbers, the mixed images, and the train step.

tests/oracles/test_optim.py compares the mixed images with timm's and torchvision's.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models.cost import count
from resnet_jax.plan import hlo
from resnet_jax.training import programs
from resnet_jax.training.losses import one_hot
from resnet_jax.training.mixup import Drawn, Mix
from tests.helpers import keyed, tiny

SIZE = 12
# A network of one block, with the stem's norm and two more.
ONE_BLOCK = {"model.overrides.stage_sizes": (1,), "model.overrides.widths": (8,)}
BOTH = {"mix.mixup_alpha": 0.8, "mix.cutmix_alpha": 1.0, "label_smoothing": 0.1}


@functools.cache
def draws(**fields) -> Drawn:
    """Draws the random numbers of 4000 ghost batches."""
    drawn = Mix(**fields).draw(jax.random.key(0), 4000, SIZE, SIZE)
    return jax.tree.map(np.asarray, drawn)


def test_a_method_that_is_on_alone_is_always_chosen():
    assert not draws(mixup_alpha=0.5).cut.any()
    assert draws(cutmix_alpha=0.5).cut.all()


def test_cutmix_is_chosen_with_the_switch_probability():
    drawn = draws(mixup_alpha=1.0, cutmix_alpha=1.0, switch_probability=0.3)
    # Five standard deviations, sqrt(.3 x .7 / 4000) each.
    assert drawn.cut.mean() == pytest.approx(0.3, abs=5 * 0.0073)


def test_ghost_batches_are_mixed_with_the_probability():
    drawn = draws(mixup_alpha=1.0, probability=0.25)
    # Five standard deviations, sqrt(.25 x .75 / 4000) each.
    assert (drawn.lam < 1).mean() == pytest.approx(0.25, abs=5 * 0.0069)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_lambda_of_mixup_has_the_moments_of_beta(alpha):
    lam = draws(mixup_alpha=alpha).lam
    # Beta(a, a) has the variance 1 / (8 a + 4); five standard deviations of mean and
    # variance over 4000 draws, of numbers from 0 to 1.
    assert lam.mean() == pytest.approx(0.5, abs=5 * 0.5 / 4000**0.5)
    assert lam.var() == pytest.approx(1 / (8 * alpha + 4), abs=5 * 0.25 / 4000**0.5)


@pytest.mark.parametrize("rule", ["timm", "torchvision"])
def test_lambda_of_cutmix_is_the_fraction_of_the_pixels(rule):
    drawn = draws(cutmix_alpha=1.0, rule=rule)
    y1, y2, x1, x2 = drawn.box.T
    assert ((y1 >= 0) & (y1 <= y2) & (y2 <= SIZE)).all()
    assert ((x1 >= 0) & (x1 <= x2) & (x2 <= SIZE)).all()
    area = (y2 - y1) * (x2 - x1)
    # One float32 rounding.
    np.testing.assert_allclose(drawn.lam, 1 - area / SIZE**2, atol=1e-7)
    assert 0.3 < (area > SIZE**2 / 4).mean() < 0.8


@pytest.mark.parametrize(
    ("rule", "partners"),
    [("timm", [2, 1, 0, 5, 4, 3]), ("torchvision", [2, 0, 1, 5, 3, 4])],
)
def test_partners_are_of_the_same_ghost_batch(rule, partners):
    images, labels = jnp.asarray(keyed.images(6, SIZE)), one_hot(jnp.arange(6), 6)
    drawn = Drawn(
        lam=jnp.array([0.25, 0.75]),
        cut=jnp.array([False, True]),
        box=jnp.array([[0, 0, 0, 0], [3, 9, 0, 6]]),
    )
    image, label = Mix(mixup_alpha=1.0, rule=rule).apply(images, labels, drawn)
    expected = np.array(0.25 * images + 0.75 * images[jnp.array(partners)])
    expected[3:] = images[3:]
    expected[3:, 3:9, 0:6] = images[jnp.array(partners[3:]), 3:9, 0:6]
    # Two float32 roundings of numbers below 5.
    np.testing.assert_allclose(image, expected, atol=1e-6)
    for row, partner in enumerate(partners):
        lam = 0.25 if row < 3 else 0.75
        weights = np.zeros(6)
        weights[row] = lam
        weights[partner] += 1 - lam
        np.testing.assert_allclose(label[row], weights)


# In the train step.


@functools.cache
def update(microbatches: int, devices: int, step: int = 0, group=2) -> dict:
    """Returns the state and metrics after a step on 32 images that are mixed."""
    changes = {
        "batch_size": 32,
        "model.bn_group_size": group,
        "optim.microbatches": microbatches,
    }
    setup = tiny.setup(ONE_BLOCK | BOTH | changes, devices)
    batch = setup.to_devices(tiny.batch(setup))
    state, metrics = programs.compile_train_step(setup)(tiny.state(setup, step), batch)
    return jax.device_get({**vars(state), **metrics})


@pytest.mark.slow
@pytest.mark.parametrize(("microbatches", "devices"), [(2, 8), (1, 8), (4, 1)])
def test_devices_and_microbatches_do_not_change_what_is_mixed(microbatches, devices):
    whole, parts = update(1, 1), update(microbatches, devices)
    # The same float32 sums in another order, as in test_sharding.py.
    assert tiny.difference(parts, whole) < 2e-5


@pytest.mark.slow
def test_steps_mix_differently():
    first, later = update(1, 1), update(1, 1, step=1)
    assert abs(later["loss"] - first["loss"]) > 1e-3
    assert tiny.difference(later["opt_state"], first["opt_state"]) > 1e-2


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_mixing_needs_no_communication(microbatches):
    changes = {"batch_size": 32, "optim.microbatches": microbatches}
    setup = tiny.setup(ONE_BLOCK | BOTH | changes | {"model.bn_group_size": 2})
    state = programs.state_like(setup)
    found = hlo.collectives(programs.compile_train_step(setup).as_text())
    assert {(one.kind, one.devices) for one in found} == {("all-reduce", 8)}
    # The same as without mixing: gradients, statistics, loss and top-1.
    expected = count(state.params) + count(state.batch_stats) + 2
    assert sum(one.elements for one in found) == expected


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy"])
def test_a_ghost_batch_of_all_images_trains_with_either_loss(loss):
    changes = {"model.bn_group_size": "global", "loss": loss}
    setup = tiny.setup(ONE_BLOCK | BOTH | changes)
    batch = setup.to_devices(tiny.batch(setup))
    _, metrics = programs.compile_train_step(setup)(tiny.state(setup), batch)
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mix.rule": "tim"}, r"mix\.rule='tim'.*Did you mean timm\?"),
        ({"mix.mixup_alpha": -1.0}, r"mix\.mixup_alpha=-1.0 must be at least 0"),
        ({"mix.probability": 2.0}, r"mix\.probability=2.0 must be from 0 to 1"),
        (
            {"mix.cutmix_alpha": 1.0, "model.bn_group_size": 1},
            r"mix\.cutmix_alpha .* model\.bn_group_size=1",
        ),
        (
            {
                "mix.mixup_alpha": 1.0,
                "batch_size": 8,
                "model.bn_group_size": "device",
            },
            r"mix\.mixup_alpha .* model\.bn_group_size=device",
        ),
    ],
)
def test_illegal_options_are_errors_that_name_the_keys(changes, message):
    with pytest.raises(UserError, match=message):
        tiny.setup(changes)
