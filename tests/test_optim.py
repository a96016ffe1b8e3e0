"""Schedules, and SGD against a transcription of torch's."""

import collections
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import common
from resnet_jax.errors import UserError
from resnet_jax.models import create_model, get_spec
from resnet_jax.models.cost import init_shapes
from resnet_jax.models.scan import stack_blocks
from resnet_jax.optim import (
    Plateau,
    decayed,
    layer_numbers,
    looks_at_layers,
    make_decay,
    make_optimizer,
    make_schedule,
    on_single_blocks,
    update_ema,
)
from tests import keyed

TRAIN_SIZE = 2560  # ten steps an epoch at the batch size of `configure`


def configure(**optim) -> ConfigDict:
    """The defaults without warm-up, with other values in `optim`."""
    config = common.get_config()
    config.batch_size = 256
    config.optim.warmup = ConfigDict({"steps": 0})
    with config.ignore_type():
        for key, value in optim.items():
            config.optim[key] = ConfigDict(value) if key == "warmup" else value
    return config


def rates(config: ConfigDict, steps, total_steps: int = 100) -> list[float]:
    """Learning rates at some steps."""
    schedule = make_schedule(config, total_steps=total_steps, train_size=TRAIN_SIZE)
    return [float(schedule(step)) for step in steps]


def about(values):
    """Equal but for a few float32 operations, 2^-24 of the peak each."""
    return pytest.approx(values, rel=1e-6, abs=1e-7)


# Schedules.


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


def test_a_warm_up_is_a_line_to_the_peak_and_the_cosine_begins_behind_it():
    config = configure(warmup={"steps": 20}, warmup_from=0.02)
    assert rates(config, [0, 5, 10, 20]) == about([0.02, 0.04, 0.06, 0.1])
    # Half of the 80 steps behind the warm-up, and all of them.
    assert rates(config, [60, 100]) == about([0.05, 0.0])


@pytest.mark.parametrize(
    "decay_at",
    [
        ({"steps": 30}, {"steps": 60}),
        ({"epochs": 3}, {"epochs": 6}),
        ({"examples": 30 * 256}, {"examples": 60 * 256}),
    ],
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_steps_decay_at_exactly_their_steps(decay_at, warmup):
    config = configure(schedule="step", decay_at=decay_at, warmup={"steps": warmup})
    got = rates(config, [5, 29, 30, 59, 60, 99])
    assert got == about([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_decays_at_the_same_step_are_all_made():
    config = configure(schedule="step", decay_at=({"steps": 30}, {"epochs": 3}))
    assert rates(config, [29, 30]) == about([0.1, 0.001])


def test_a_decay_in_the_warm_up_is_made_behind_it():
    config = configure(
        schedule="step",
        decay_at=({"steps": 10}, {"steps": 30}),
        warmup={"steps": 20},
    )
    assert rates(config, [10, 19, 20, 29, 30]) == about(
        [0.05, 0.095, 0.01, 0.01, 0.001]
    )


def test_a_constant_rate_stays_behind_its_warm_up():
    config = configure(schedule="constant", warmup={"epochs": 1})
    assert rates(config, [0, 5, 10, 99]) == about([0.0, 0.05, 0.1, 0.1])


@pytest.mark.parametrize("warmup", [100, 101])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup):
    config = configure(warmup={"steps": warmup})
    with pytest.raises(UserError, match=f"warmup takes {warmup} steps.*only 100"):
        rates(config, [0])


def test_an_unknown_schedule_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"schedule='cosin'.*Did you mean cosine\?"):
        rates(configure(schedule="cosin"), [0])


def test_a_decay_that_is_no_duration_is_named_with_its_key():
    config = configure(schedule="step", decay_at=({"epoch": 30},))
    with pytest.raises(UserError, match=r"optim\.decay_at"):
        rates(config, [0])


# Which parameters decay.


def decay_leaves(name: str, exclude: str) -> tuple[set, collections.Counter]:
    """Last names of the parameters that decay, and how many of them there are."""
    params = init_shapes(create_model(name), 32)["params"]
    kinds: dict[bool, list[str]] = {True: [], False: []}
    for path, yes in jax.tree_util.tree_leaves_with_path(decayed(params, exclude)):
        kinds[yes].append("/".join(key.key for key in path))
    return kinds[True], kinds[False]


# ResNet-18: 17 convolutions, 3 projections, each with a norm; CIFAR-20: 19, no
# projections; one head each.
CONVS = {"resnet18": 20, "cifar_resnet20": 19}


@pytest.mark.parametrize("name", CONVS)
def test_with_none_excluded_every_parameter_decays(name):
    yes, no = decay_leaves(name, "none")
    assert (len(yes), no) == (3 * CONVS[name] + 2, [])


@pytest.mark.parametrize("name", CONVS)
def test_norm_excludes_scales_and_biases_of_norms_but_not_the_head(name):
    yes, no = decay_leaves(name, "norm")
    assert len(no) == 2 * CONVS[name]
    assert all("norm" in leaf.split("/")[-2] for leaf in no)
    assert {"head/bias", "head/kernel", "stem_conv1/kernel"} <= set(yes)
    assert len(yes) == CONVS[name] + 2


@pytest.mark.parametrize("name", CONVS)
def test_norm_and_bias_leaves_kernels_only(name):
    yes, no = decay_leaves(name, "norm+bias")
    assert {leaf.split("/")[-1] for leaf in yes} == {"kernel"}
    assert (len(yes), len(no)) == (CONVS[name] + 1, 2 * CONVS[name] + 1)
    assert "head/bias" in no


def test_the_norm_of_a_shortcut_counts_as_a_norm():
    yes, no = decay_leaves("resnet18", "norm")
    assert "stage2_block1/shortcut/conv/kernel" in yes
    assert {f"stage2_block1/shortcut/norm/{leaf}" for leaf in ("scale", "bias")} <= set(
        no
    )


def test_an_unknown_exclusion_is_answered_with_the_nearest():
    config = configure(weight_decay_exclude="norms")
    with pytest.raises(UserError, match=r"exclude='norms'.*Did you mean norm"):
        make_optimizer(config, optax.constant_schedule(0.1))


# The update.

SHAPES = {
    "conv1": {"kernel": (3, 3, 2, 4)},
    "norm1": {"scale": (4,), "bias": (4,)},
    "head": {"kernel": (4, 5), "bias": (5,)},
}
PATHS = [(module, leaf) for module, leaves in SHAPES.items() for leaf in leaves]


def draw(name: str) -> dict:
    """Draws a tree of parameters or gradients."""
    rng = keyed.generator(name)
    return {
        module: {
            leaf: rng.standard_normal(shape, np.float32)
            for leaf, shape in leaves.items()
        }
        for module, leaves in SHAPES.items()
    }


def schedule(step):
    """A learning rate that changes with every step."""
    return 0.1 / (1 + step)


class TorchSGD:
    """torch.nn.utils.clip_grad_norm_ and torch.optim.SGD (2.x) in float64.

    The learning rate is outside the buffer, so the buffer does not know when it
    changes.
    """

    def __init__(self, params, decays, *, momentum, nesterov, weight_decay, clip_norm):
        self.params = {p: params[p[0]][p[1]].astype(np.float64) for p in PATHS}
        self.buffers = {}
        self.decays, self.momentum, self.nesterov = decays, momentum, nesterov
        self.weight_decay, self.clip_norm = weight_decay, clip_norm

    def step(self, grads, lr: float) -> None:
        grads = {p: grads[p[0]][p[1]].astype(np.float64) for p in PATHS}
        if self.clip_norm:
            norm = np.sqrt(sum(np.square(grad).sum() for grad in grads.values()))
            factor = min(1.0, self.clip_norm / (norm + 1e-6))
            grads = {p: grad * factor for p, grad in grads.items()}
        for p, grad in grads.items():
            if self.weight_decay and p in self.decays:
                grad = grad + self.weight_decay * self.params[p]
            if self.momentum:
                if p in self.buffers:
                    self.buffers[p] = self.momentum * self.buffers[p] + grad
                else:
                    self.buffers[p] = grad
                buffer = self.buffers[p]
                grad = grad + self.momentum * buffer if self.nesterov else buffer
            self.params[p] = self.params[p] - lr * grad


KERNELS = {("conv1", "kernel"), ("head", "kernel")}
DECAYS = {
    "none": set(PATHS),
    "norm": KERNELS | {("head", "bias")},
    "norm+bias": KERNELS,
}


@pytest.mark.parametrize(
    ("momentum", "nesterov", "weight_decay", "exclude", "clip_norm"),
    [
        (0.0, False, 0.0, "none", 0.0),
        (0.9, False, 0.0, "none", 0.0),
        (0.9, True, 0.0, "none", 0.0),
        (0.9, True, 0.05, "none", 0.0),
        (0.9, False, 0.05, "norm", 0.0),
        (0.0, False, 0.05, "norm+bias", 0.0),
        # The gradients' norm is about sqrt(105) = 10, so one bound clips every step
        # and the other some.
        (0.9, True, 0.05, "norm+bias", 1.0),
        (0.9, False, 0.05, "none", 10.0),
    ],
)
def test_twenty_updates_equal_those_of_torch(
    momentum, nesterov, weight_decay, exclude, clip_norm
):
    config = configure(
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        weight_decay_exclude=exclude,
        clip_norm=clip_norm,
    )
    optimizer = make_optimizer(config, schedule)
    params = draw("params")
    theirs = TorchSGD(
        params,
        DECAYS[exclude],
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
    )

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for step in range(20):
        grads = draw(f"gradients of step {step}")
        params, state = update(params, state, grads)
        theirs.step(grads, schedule(step))
    for module, leaf in PATHS:
        # Twenty updates of at most 1, rounded to 2^-24 of numbers below 10; torch's
        # 1e-6 in the divisor of clipping changes updates by a ten-millionth.
        np.testing.assert_allclose(
            params[module][leaf], theirs.params[module, leaf], atol=1e-5
        )


@pytest.mark.parametrize("step", [0, 7, 1_000_000])
def test_the_average_grows_slower_with_the_step(step):
    old, new = draw("old"), draw("new")
    decay = min(0.99, (1 + step) / (10 + step))
    got = update_ema(old, new, 0.99, jnp.int32(step))
    for module, leaf in PATHS:
        expected = decay * old[module][leaf] + (1 - decay) * new[module][leaf]
        # Three float32 operations on numbers below 5.
        np.testing.assert_allclose(got[module][leaf], expected, atol=2e-6)


# More schedules; tests/oracles/test_optim.py holds them against torch's and timm's.


def test_a_cosine_and_a_polynomial_end_where_they_are_told():
    for schedule in ("cosine", "polynomial", "triangular"):
        config = configure(schedule=schedule, end_learning_rate=0.01)
        assert rates(config, [0, 100]) == about([0.1, 0.01])


def test_a_polynomial_is_a_power_of_what_is_left():
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
    # Half of the 40 steps behind the warm-up.
    assert rates(config, [20, 40, 60, 99]) == about([0.1, 0.06, 0.02, 0.02])


def test_a_warm_up_may_take_the_place_of_the_beginning():
    config = configure(warmup={"steps": 25}, warmup_prefix=False)
    full = configure()
    assert rates(config, [0, 5]) == about([0.0, 0.02])
    assert rates(config, [25, 50, 99]) == about(rates(full, [25, 50, 99]))


@pytest.mark.parametrize("train_size", [2560, 2500, 3001])
def test_a_rate_by_epochs_is_that_of_the_first_step(train_size):
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


def test_a_plateau_is_lowered_when_more_evaluations_than_borne_are_no_better():
    plateau = Plateau(configure(schedule="plateau", patience=2).optim)
    memory, factors = None, []
    for top1 in (0.1, 0.3, 0.3, 0.2, 0.29, 0.31, 0.31, 0.3, 0.2, 0.1, 0.1, 0.1):
        memory = plateau.after(memory, top1)
        factors.append(memory["factor"])
    assert factors[:4] == [1.0] * 4
    assert factors[4:] == pytest.approx([0.1] * 4 + [0.01] * 2 + [0.01, 0.001])


# Contradictions.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "lambs"}, r"optim\.name='lambs'.*Did you mean lamb"),
        ({"decay": "l2"}, r"optim\.decay='l2'.*Known: coupled, decoupled, schedule"),
        ({"momentum_form": "tf"}, r"optim\.momentum_form='tf'"),
        ({"schedule": "step"}, r"schedule=step needs optim\.decay_at"),
        ({"agc": 0.01, "clip_norm": 1.0}, r"optim\.agc=0.01 and optim\.clip_norm=1.0"),
        ({"name": "adamw"}, r"name=adamw .*optim\.decay=coupled"),
        ({"name": "lars", "decay": "decoupled"}, r"name=lars .*decay=decoupled"),
        ({"name": "lamb", "weight_decay": 0.0}, r"name=lamb .*optim\.weight_decay"),
        ({"schedule": "plateau", "decay": "schedule"}, r"plateau .*decay=schedule"),
        ({"layer_decay": 0.0}, r"layer_decay=0.0 must be more than 0"),
        ({"sam_rho": -0.1}, r"sam_rho=-0.1 must be at least 0"),
        ({"sam_every": 0}, r"sam_every=0 must be at least 1"),
        ({"momentum": 1.0}, r"momentum=1.0 must be .* less than 1"),
        ({"betas": (0.9, 1.0)}, r"betas=1.0 must be .* less than 1"),
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
def test_contradictions_are_refused_with_both_keys(changes, message):
    with pytest.raises(UserError, match=message):
        rates(configure(**changes), [0])


# Layers.


def test_layers_are_numbered_from_the_stem_by_blocks_to_the_head():
    params = init_shapes(create_model("resnet18"), 32)["params"]
    numbers = {
        "/".join(key.key for key in path): number
        for path, number in jax.tree_util.tree_leaves_with_path(layer_numbers(params))
    }
    assert numbers["stem_conv1/kernel"] == numbers["stem_norm1/bias"] == 0
    assert numbers["stage1_block1/conv1/kernel"] == 1
    assert numbers["stage2_block1/shortcut/conv/kernel"] == 3
    assert numbers["stage4_block2/conv2/kernel"] == 8
    assert numbers["head/kernel"] == numbers["head/bias"] == 9


def test_a_final_norm_counts_with_the_last_block():
    params = init_shapes(create_model("preact110"), 32)["params"]
    numbers = layer_numbers(params)
    assert numbers["final_norm"]["scale"] == 54
    assert numbers["head"]["kernel"] == 55


def test_a_tenth_block_is_behind_the_ninth():
    params = {f"stage1_block{i}": {"kernel": np.zeros(1)} for i in (10, 2, 9)}
    numbers = layer_numbers(params)
    assert [numbers[f"stage1_block{i}"]["kernel"] for i in (2, 9, 10)] == [1, 2, 3]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"name": "lars"}, marks=pytest.mark.slow),
        pytest.param({"name": "lamb"}, marks=pytest.mark.slow),
        {"agc": 0.01},
        {"layer_decay": 0.8},
        {"weight_decay_exclude": "ndim<=1", "weight_decay": 0.1},
    ],
    ids=str,
)
def test_stacked_blocks_are_updated_as_single_ones(changes):
    spec = get_spec("cifar_resnet20")
    single = keyed.variables(spec)["params"]
    grads = keyed.variables(spec, seed=1)["params"]
    config = configure(**changes)
    assert looks_at_layers(config.optim)
    optimizer = make_optimizer(config, schedule)
    stacked = on_single_blocks(optimizer, spec)

    def update(optimizer, convert):
        def converted(tree):
            return convert({"params": tree}, spec)["params"] if convert else tree

        params = converted(single)
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(converted(grads), state, params)
            params = optax.apply_updates(params, updates)
        return params

    expected = stack_blocks({"params": update(optimizer, None)}, spec)["params"]
    got = update(stacked, stack_blocks)
    # Norms over the same numbers in another layout, a few float32 roundings.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(same, got, expected)


def test_only_what_looks_at_layers_sees_single_blocks():
    # The state of older runs with stacked blocks stays as it was.
    assert not looks_at_layers(configure().optim)


# Decay, as it is drawn.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 0.1 * 1e-4 / 0.1),
        ({"momentum": 0.0}, 0.1 * 1e-4),
        ({"decay": "decoupled"}, 0.1 * 1e-4),
        ({"decay": "schedule"}, 1e-4),
        ({"name": "lamb"}, 0.1 * 1e-4),
        ({"name": "adam"}, None),
        ({"weight_decay": 0.0}, None),
    ],
)
def test_weights_without_gradient_shrink_as_it_is_drawn(changes, expected):
    config = configure(schedule="constant", **changes)
    rate = make_schedule(config, total_steps=100, train_size=TRAIN_SIZE)
    decay = make_decay(config, rate)
    assert (decay(0) if decay else None) == (about(expected) if expected else None)
    if not decay or config.optim.name == "lamb":
        return
    optimizer = make_optimizer(config, rate)
    params = {"head": {"kernel": jnp.ones((1, 1))}}
    state, before = optimizer.init(params), 1.0
    # Momentum needs some steps.
    for _ in range(150):
        before = params["head"]["kernel"]
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = optimizer.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    lost = float(1 - params["head"]["kernel"][0, 0] / before[0, 0])
    # To first order in the decay, from numbers near 1 in float32.
    assert lost == pytest.approx(expected, rel=2e-2, abs=2e-7)
