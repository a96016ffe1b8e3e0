"""One update: its parts, what it averages, what it keeps in float32."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from jax.extend.core import jaxprs_in_params
from ml_collections import ConfigDict

from resnet_jax.errors import UserError
from resnet_jax.step import StepOptions, group_size_of, make_train_step, normalize
from resnet_jax.train import train
from tests import tiny

# One block: the stem's norm and two more.
ONE_BLOCK = {"model.overrides.stage_sizes": (1,), "model.overrides.widths": (8,)}


# Normalisation.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Every grey level in every channel.
LEVELS = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
NORMALISED = (LEVELS / 255.0 - MEAN) / STD


def test_normalize_is_x_over_255_minus_mean_over_std():
    got = normalize(jnp.asarray(LEVELS), MEAN, STD, jnp.float32)
    # The difference of two numbers up to 5, each rounded twice.
    np.testing.assert_allclose(got, NORMALISED, atol=4 * 5 * 2**-24)


def test_normalize_rounds_to_bfloat16_at_the_very_end():
    got = normalize(jnp.asarray(LEVELS), MEAN, STD, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    # Half a unit in the last of bfloat16's 8 digits, and the float32 error from above.
    np.testing.assert_allclose(got.astype(float), NORMALISED, rtol=2**-8, atol=2e-6)


# Microbatches.


@functools.cache
def update(microbatches: int, devices: int) -> dict:
    """State and metrics after an update by 32 images in groups of two.

    Without decay, the momentum in the state is the gradient.
    """
    changes = {
        "batch_size": 32,
        "optim.microbatches": microbatches,
        "optim.weight_decay": 0.0,
    }
    setup = tiny.setup(ONE_BLOCK | changes, devices)
    train_step = setup.compile_train_step()
    batch = setup.to_devices(tiny.batch(setup))
    state, metrics = train_step(tiny.state(setup), batch)
    return jax.device_get({**vars(state), **metrics})


# On 8 devices four microbatches of 8 images have one image on each, half a group.
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_give_the_update_of_the_whole_batch(microbatches, devices):
    whole, parts = update(1, 1), update(microbatches, devices)
    # The same float32 sums in another order, as in test_sharding.py.
    assert tiny.difference(parts, whole) < 2e-5


def test_grad_norm_is_the_length_of_the_gradient():
    whole = update(1, 1)
    squares = [np.square(leaf).sum() for leaf in jax.tree.leaves(whole["opt_state"])]
    # The schedule's counter is in the optimiser's state too, and is 1.
    expected = np.sqrt(sum(squares) - 1)
    # A float32 sum of a thousand squares.
    assert whole["grad_norm"] == pytest.approx(expected, rel=1e-5)


# What the compiled step keeps.


@pytest.fixture(scope="module")
def averaged():
    """A setup that keeps an average, and its compiled step, on 8 devices."""
    setup = tiny.setup(ONE_BLOCK | {"ema_decay": 0.9, "optim.clip_norm": 0.01})
    return setup, setup.compile_train_step()


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (5, 0.4), (1000, 0.9)])
def test_the_average_covers_parameters_and_statistics(averaged, step, decay):
    setup, train_step = averaged
    before = jax.device_get(tiny.state(setup, step))
    after, _ = train_step(tiny.state(setup, step), setup.to_devices(tiny.batch(setup)))
    assert after.step == step + 1
    for name in ("params", "batch_stats"):
        expected = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * np.asarray(new),
            before.ema[name],
            vars(after)[name],
        )
        # Three float32 operations.
        assert tiny.difference(after.ema[name], expected) < 1e-6
    assert set(after.ema) == {"params", "batch_stats"}


def test_the_state_is_donated_and_the_batch_is_not(averaged):
    setup, train_step = averaged
    state, batch = tiny.state(setup), setup.to_devices(tiny.batch(setup))
    train_step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in batch.values())


def test_the_same_step_gives_the_same_bits(averaged):
    setup, train_step = averaged
    batch = setup.to_devices(tiny.batch(setup))
    once, again = (
        [leaf.tobytes() for leaf in jax.tree.leaves(jax.device_get(out))]
        for out in (train_step(tiny.state(setup), batch) for _ in range(2))
    )
    assert once == again


def test_grad_norm_is_that_of_the_gradient_before_clipping(averaged):
    setup, train_step = averaged
    _, metrics = train_step(tiny.state(setup), setup.to_devices(tiny.batch(setup)))
    assert metrics["grad_norm"] > 10 * setup.config.optim.clip_norm


# Precision.


def dtypes_by_primitive(jaxpr) -> dict[str, set[str]]:
    """Types of the results of each primitive, also in inner functions."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for equation in jaxpr.eqns:
        inner = list(jaxprs_in_params(equation.params))
        for part in inner:
            for name, dtypes in dtypes_by_primitive(part).items():
                found[name] |= dtypes
        if not inner:
            name = equation.primitive.name
            found[name] |= {str(out.aval.dtype) for out in equation.outvars}
    return found


def test_bfloat16_is_for_the_layers_alone():
    setup = tiny.setup({"model.dtype": "bfloat16"})
    options = StepOptions(mean=(0.5,), std=(0.5,), ema_decay=0.9)
    train_step = make_train_step(setup.model, setup.optimizer, options)
    state = setup.state_like()
    state = state.replace(ema=state.evaluated())
    batch = setup.batch_like(16, "image", "label")
    traced = jax.jit(train_step).trace(state, batch)

    # Parameters, statistics, momentum, average and metrics; int32: counters of steps.
    after, metrics = traced.out_info
    assert {leaf.dtype.name for leaf in metrics.values()} == {"float32"}
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(after)}
    assert dtypes == {"float32", "int32"}
    dtypes = dtypes_by_primitive(traced.jaxpr)
    assert dtypes["conv_general_dilated"] == {"bfloat16"}
    # The head multiplies bfloat16, but its sums are logits and gradients.
    assert dtypes["dot_general"] == {"float32"}
    # The softmax, and the deviations in norms.
    assert dtypes["exp"] == dtypes["log"] == dtypes["sqrt"] == {"float32"}


# Batch-norm groups.


@pytest.mark.parametrize(
    ("chosen", "microbatches", "size"),
    [
        (32, 1, 32),
        (1, 1, 1),
        (256, 1, 256),
        (32, 4, 32),
        ("global", 1, None),
        ("global", 4, None),
        ("device", 1, 32),
        ("device", 4, 8),
    ],
)
def test_a_group_size_is_a_number_or_a_name(chosen, microbatches, size):
    got = group_size_of(chosen, batch_size=256, microbatches=microbatches, devices=8)
    assert got == size


@pytest.mark.parametrize(
    ("chosen", "batch_size", "microbatches", "message"),
    [
        (30, 256, 1, r"=30 .* the batch of 256; .* does: 16 or 32\."),
        (512, 256, 1, r"=512 .* the batch of 256; .* does: 256\."),
        (0, 256, 1, r"=0 .* does: 1\."),
        (-4, 256, 1, r"=-4 .* does: 1\."),
        (96, 384, 3, r"=96 .* a microbatch of 128 \(384 / 3\); .*: 64 or 128\."),
        # Legal for the batch, but larger than a microbatch.
        (128, 256, 4, r"=128 .* a microbatch of 64 \(256 / 4\); .* does: 64\."),
    ],
)
def test_an_illegal_group_size_is_answered_with_the_nearest_legal_ones(
    chosen, batch_size, microbatches, message
):
    with pytest.raises(UserError, match="model.bn_group_size" + message):
        group_size_of(
            chosen, batch_size=batch_size, microbatches=microbatches, devices=8
        )


@pytest.mark.parametrize("chosen", ["gloabl", "32", 32.0, None, True])
def test_a_group_size_that_is_neither_number_nor_name_is_refused(chosen):
    match = re.escape(f"model.bn_group_size={chosen!r} is neither")
    with pytest.raises(UserError, match=match):
        group_size_of(chosen, batch_size=256, microbatches=1, devices=8)


@pytest.mark.parametrize(
    ("microbatches", "nearest"),
    # 256 images on 8 devices: 32 a device, so any divisor of 32 will do.
    [(-1, "1"), (0, "1"), (3, "2 or 4"), (24, "16 or 32"), (64, "32"), (999, "32")],
)
def test_microbatches_that_devices_cannot_share_are_answered_with_the_nearest(
    microbatches, nearest
):
    match = rf"optim\.microbatches={microbatches} .*256 .*8 devices.*: {nearest}\."
    with pytest.raises(UserError, match=match):
        group_size_of(32, batch_size=256, microbatches=microbatches, devices=8)


# Compilation.


@pytest.mark.slow
def test_a_run_compiles_its_step_once(tmp_path):
    names = []

    def note(event: str, duration: float, **details) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details["fun_name"])

    config = tiny.config(ONE_BLOCK | {"ema_decay": 0.9})
    config.log_every = ConfigDict({"steps": 1})
    config.evaluate.every = ConfigDict({"steps": 2})
    config.checkpoint.every = ConfigDict({"steps": 1})
    monitoring.register_event_duration_secs_listener(note)
    try:
        result = train(config, tmp_path / "run")
    finally:
        monitoring.unregister_event_duration_listener(note)
    assert result["step"] == 4
    assert sum("train_step" in name for name in names) == 1
    assert sum("eval_step" in name for name in names) == 1
