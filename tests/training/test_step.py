"""The train step: microbatches, EMA, precision, SAM, distillation, compilation."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring
from ml_collections import ConfigDict

from resnet_jax.models.cost import inner_jaxprs
from resnet_jax.models.inputs import normalize
from resnet_jax.parallel import sharding
from resnet_jax.training import programs
from resnet_jax.training.loop import train
from resnet_jax.training.step import (
    StepOptions,
    make_train_step,
)
from tests.helpers import keyed, tiny

# A network of one block, with the stem's norm and two more.
ONE_BLOCK = {"model.overrides.stage_sizes": (1,), "model.overrides.widths": (8,)}


# Normalisation.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Every grey level in every channel.
LEVELS = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
NORMALISED = (LEVELS / 255.0 - MEAN) / STD


def test_normalize_is_x_over_255_minus_mean_over_std():
    got = normalize(jnp.asarray(LEVELS), MEAN, STD, jnp.float32)
    # A difference of two numbers up to 5, each rounded twice.
    np.testing.assert_allclose(got, NORMALISED, atol=4 * 5 * 2**-24)


def test_normalize_rounds_to_bfloat16_at_the_very_end():
    got = normalize(jnp.asarray(LEVELS), MEAN, STD, jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    # Half a unit in the last of bfloat16's 8 digits, and the float32 error as before.
    np.testing.assert_allclose(got.astype(float), NORMALISED, rtol=2**-8, atol=2e-6)


# Microbatches.


@functools.cache
def update(microbatches: int, devices: int) -> dict:
    """Returns the state and metrics after a step on 32 images in ghost batches of two.

    Without weight decay, the momentum in the state is the gradient.
    """
    changes = {
        "batch_size": 32,
        "optim.microbatches": microbatches,
        "optim.weight_decay": 0.0,
    }
    setup = tiny.setup(ONE_BLOCK | changes, devices)
    train_step = programs.compile_train_step(setup)
    batch = setup.to_devices(tiny.batch(setup))
    state, metrics = train_step(tiny.state(setup), batch)
    return jax.device_get({**vars(state), **metrics})


@pytest.mark.slow
# On 8 devices, each of four microbatches has one image per device: half a ghost batch.
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_give_the_update_of_the_complete_batch(microbatches, devices):
    whole, parts = update(1, 1), update(microbatches, devices)
    # The same float32 sums in another order, as in test_sharding.py.
    assert tiny.difference(parts, whole) < 2e-5


# With fake labels, of which some classes have seven images and others six.
WEIGHTED = ONE_BLOCK | {"batch_size": 32, "data.class_weights": "inverse_frequency"}


def weighted_update(devices: int = 1, **changes) -> dict:
    """Returns the state and metrics after a step with class weights on 32 images."""
    setup = tiny.setup(WEIGHTED | changes, devices)
    batch = setup.to_devices(tiny.batch(setup))
    state, metrics = programs.compile_train_step(setup)(tiny.state(setup), batch)
    return jax.device_get({**vars(state), **metrics})


def test_a_step_with_class_weights_divides_by_the_weights_of_its_images():
    setup = tiny.setup(WEIGHTED, 1)
    batch, state = tiny.batch(setup), jax.device_get(tiny.state(setup))
    data = setup.config.data
    image = jnp.asarray(batch["image"])
    image = normalize(image, data.mean, data.std, jnp.float32)
    logits, _ = setup.model.apply(
        {"params": state.params, "batch_stats": state.batch_stats},
        image,
        train=True,
        mutable=["batch_stats"],
    )
    logits = np.asarray(logits, np.float64)
    weights = np.where(np.arange(10) < 4, 64 / 70, 64 / 60)[batch["label"]]
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    losses = -log_p[np.arange(32), batch["label"]]
    expected = (weights * losses).sum() / weights.sum()
    # Equal weights would change it by more.
    assert abs(losses.mean() - expected) > 1e-4 * expected
    # The float32 sums of a forward pass, as in the other comparisons.
    assert weighted_update()["loss"] == pytest.approx(expected, rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_microbatches_share_the_sum_of_the_class_weights_of_their_batch(devices):
    whole = weighted_update()
    parts = weighted_update(devices, **{"optim.microbatches": 4})
    # The same float32 sums in another order, as in test_sharding.py.
    assert tiny.difference(parts, whole) < 2e-5


def test_grad_norm_is_the_length_of_the_gradient():
    whole = update(1, 1)
    squares = [np.square(leaf).sum() for leaf in jax.tree.leaves(whole["opt_state"])]
    # The schedule's counter is in the optimiser's state too, and is 1.
    expected = np.sqrt(sum(squares) - 1)
    # A float32 sum of a thousand squares.
    assert whole["grad_norm"] == pytest.approx(expected, rel=1e-5)


# Guarantees of the compiled step.


@pytest.fixture(scope="module")
def averaged():
    """Returns an experiment that keeps an EMA, and its compiled step, on 8 devices."""
    setup = tiny.setup(ONE_BLOCK | {"ema_decay": 0.9, "optim.clip_norm": 0.01})
    return setup, programs.compile_train_step(setup)


@pytest.mark.parametrize(("step", "decay"), [(0, 0.1), (5, 0.4), (1000, 0.9)])
def test_the_ema_covers_parameters_and_statistics(averaged, step, decay):
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
        # The error of three float32 operations.
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
    """Returns the result types of each primitive, those in nested programs included."""
    found: dict[str, set[str]] = collections.defaultdict(set)
    for equation in jaxpr.eqns:
        inner = inner_jaxprs(equation)
        for part in inner:
            for name, dtypes in dtypes_by_primitive(part).items():
                found[name] |= dtypes
        if not inner:
            name = equation.primitive.name
            found[name] |= {str(out.aval.dtype) for out in equation.outvars}
    return found


def test_only_layers_compute_in_bfloat16():
    setup = tiny.setup({"model.dtype": "bfloat16"})
    options = StepOptions(mean=(0.5,), std=(0.5,), ema_decay=0.9)
    train_step = make_train_step(setup.model, setup.optimizer, options)
    state = programs.state_like(setup)
    state = state.replace(ema=state.evaluated())
    batch = programs.train_batch_like(setup)
    traced = jax.jit(train_step).trace(state, batch)

    # Parameters, statistics, momentum, EMA and metrics; the int32 are step counters.
    after, metrics = traced.out_info
    assert {leaf.dtype.name for leaf in metrics.values()} == {"float32"}
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(after)}
    assert dtypes == {"float32", "int32"}
    dtypes = dtypes_by_primitive(traced.jaxpr)
    assert dtypes["conv_general_dilated"] == {"bfloat16"}
    # The head multiplies bfloat16, but accumulates logits and gradients in float32.
    assert dtypes["dot_general"] == {"float32"}
    # These are in the softmax, and in the standard deviations of norms.
    assert dtypes["exp"] == dtypes["log"] == dtypes["sqrt"] == {"float32"}


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


# Sharpness-aware minimisation.


@functools.cache
def sharp_update(microbatches: int, devices: int, step: int = 0, rho: float = 0.1):
    """Runs the step of `update` with sharpness-aware minimisation."""
    changes = {
        "batch_size": 32,
        "optim.microbatches": microbatches,
        "optim.weight_decay": 0.0,
        "optim.sam_rho": rho,
        "optim.sam_every": 2,
    }
    setup = tiny.setup(ONE_BLOCK | changes, devices)
    batch = setup.to_devices(tiny.batch(setup))
    state, metrics = programs.compile_train_step(setup)(tiny.state(setup, step), batch)
    return jax.device_get({**vars(state), **metrics})


@pytest.mark.slow
def test_sam_every_2_applies_to_every_second_step():
    plain, sharp = sharp_update(1, 1, step=0), sharp_update(1, 1, step=1)
    assert tiny.difference(plain["params"], update(1, 1)["params"]) < 2e-5
    assert tiny.difference(sharp["opt_state"], plain["opt_state"]) > 1e-3
    # The metrics and statistics are those at the unperturbed parameters.
    assert sharp["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert sharp["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)
    assert tiny.difference(sharp["batch_stats"], plain["batch_stats"]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(("microbatches", "devices"), [(4, 1), (2, 8)])
def test_microbatches_are_perturbed_together(microbatches, devices):
    whole, parts = sharp_update(1, 1, 1), sharp_update(microbatches, devices, 1)
    # Twice the bound of a plain step with microbatches.
    assert tiny.difference(parts, whole) < 4e-5


# Distillation.


@pytest.mark.slow
def test_with_a_distillation_weight_of_1_labels_have_no_effect():
    changes = {
        "distill.teacher": "cifar_resnet20",
        "distill.teacher_init": "drawn",
        "distill.weight": 1.0,
    }
    setup = tiny.setup(ONE_BLOCK | changes, 8)
    teacher = jax.device_put(
        keyed.variables(setup.teacher.model.spec), sharding.replicated(setup.mesh)
    )
    train_step = programs.compile_train_step(setup, teacher)
    batch = tiny.batch(setup)
    results = []
    for labels in (batch["label"], (batch["label"] + 1) % 10):
        placed = setup.to_devices({**batch, "label": labels})
        state, metrics = train_step(tiny.state(setup), placed)
        results.append(jax.device_get((state.params, metrics["loss"])))
    assert results[0][1] == results[1][1] > 0
    jax.tree.map(np.testing.assert_array_equal, results[0][0], results[1][0])

    # The expected loss is the divergence of both networks' outputs.
    data = setup.config.data
    image = normalize(jnp.asarray(batch["image"]), data.mean, data.std, jnp.float32)
    variables = tiny.state(setup).evaluated()
    ours, _ = setup.model.apply(variables, image, train=True, mutable=["batch_stats"])
    theirs = setup.teacher.model.apply(jax.device_get(teacher), image, train=False)
    p, q = (jax.nn.softmax(np.asarray(x, np.float64)) for x in (theirs, ours))
    expected = np.sum(p * np.log(p / q), axis=1).mean()
    # The float32 error of twenty layers.
    assert results[0][1] == pytest.approx(float(expected), rel=1e-4)
    # The teacher is not in the state.
    assert set(vars(state)) == set(vars(tiny.state(setup)))
