"""Optimisers, with SGD against a transcription of torch's, and the EMA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import create_model, get_spec
from resnet_jax.models.cost import init_shapes
from resnet_jax.models.scan import stack_blocks
from resnet_jax.training.optim import (
    decayed,
    layer_numbers,
    make_decay,
    make_optimizer,
    needs_single_blocks,
    on_single_blocks,
    update_ema,
)
from resnet_jax.training.schedules import make_schedule
from tests.helpers import keyed
from tests.helpers.optim_configs import TRAIN_SIZE, about, configure

# Which parameters decay.


def decay_leaves(name: str, exclude: str) -> tuple[list[str], list[str]]:
    """Returns the paths of the parameters with and without weight decay."""
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
def test_norm_and_bias_excludes_all_but_kernels(name):
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


def test_an_unknown_exclusion_is_an_error_that_names_the_nearest():
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
    """Returns a learning rate that changes with every step."""
    return 0.1 / (1 + step)


class TorchSGD:
    """torch.nn.utils.clip_grad_norm_ and torch.optim.SGD (2.x) in float64.

    The learning rate is applied after the momentum, so that the buffer does not depend
    on its changes.
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
        # The gradients' norm is about sqrt(105) = 10, so that the first bound clips
        # every step, and the second some steps.
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


# The EMA.


@pytest.mark.parametrize("step", [0, 7, 1_000_000])
def test_the_decay_rate_of_the_ema_grows_with_the_step(step):
    old, new = draw("old"), draw("new")
    decay = min(0.99, (1 + step) / (10 + step))
    got = update_ema(old, new, 0.99, jnp.int32(step))
    for module, leaf in PATHS:
        expected = decay * old[module][leaf] + (1 - decay) * new[module][leaf]
        # Three float32 operations on numbers below 5.
        np.testing.assert_allclose(got[module][leaf], expected, atol=2e-6)


@pytest.mark.parametrize(
    ("every", "warmup", "step", "decay"),
    [
        (4, "none", 8, 0.9),
        (4, "none", 9, 1.0),
        (1, "none", 0, 0.9),
        (1, "timm", 0, 0.0),
        (1, "timm", 7, 0.75),
        # With a warm-up until step 3 the EMA is a copy at 0 and at 4, the first update
        # after it.
        (4, "copy", 0, 0.0),
        (4, "copy", 4, 0.0),
        (4, "copy", 8, 0.9),
    ],
)
def test_the_ema_is_updated_at_its_steps_with_its_rate(every, warmup, step, decay):
    old, new = {"x": jnp.float32(3.0)}, {"x": jnp.float32(5.0)}
    got = update_ema(
        old, new, 0.9, jnp.int32(step), every=every, warmup=warmup, copy_until=3
    )
    # Three float32 roundings of numbers below 5.
    assert float(got["x"]) == pytest.approx(decay * 3 + (1 - decay) * 5, abs=1e-6)


# Contradictions.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "lambs"}, r"optim\.name='lambs'.*Did you mean lamb"),
        ({"decay": "l2"}, r"optim\.decay='l2'.*Known: coupled, decoupled, schedule"),
        ({"momentum_form": "tf"}, r"optim\.momentum_form='tf'"),
        ({"agc": 0.01, "clip_norm": 1.0}, r"optim\.agc=0.01 and optim\.clip_norm=1.0"),
        ({"name": "adamw"}, r"name=adamw .*optim\.decay=coupled"),
        ({"name": "lars", "decay": "decoupled"}, r"name=lars .*decay=decoupled"),
        ({"name": "lamb", "weight_decay": 0.0}, r"name=lamb .*optim\.weight_decay"),
        ({"schedule": "plateau", "decay": "schedule"}, r"plateau .*decay=schedule"),
    ],
)
def test_contradictions_are_errors_that_name_both_keys(changes, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(configure(**changes), schedule)


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


def test_blocks_are_ordered_by_number_not_by_name():
    params = {f"stage1_block{i}": {"kernel": np.zeros(1)} for i in (10, 2, 9)}
    numbers = layer_numbers(params)
    assert [numbers[f"stage1_block{i}"]["kernel"] for i in (2, 9, 10)] == [1, 2, 3]


@pytest.mark.slow
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
def test_stacked_blocks_are_updated_like_single_blocks(changes):
    spec = get_spec("cifar_resnet20")
    single = keyed.variables(spec)["params"]
    grads = keyed.variables(spec, seed=1)["params"]
    config = configure(**changes)
    assert needs_single_blocks(config.optim)
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
    # Norms of the same numbers in another layout differ by a few float32 roundings.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(same, got, expected)


def test_sgd_updates_stacked_blocks_as_they_are():
    # So older runs with stacked blocks keep the tree of their state.
    assert not needs_single_blocks(configure().optim)


# The effective decay, which is plotted.


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
def test_weights_without_gradient_shrink_by_the_effective_decay(changes, expected):
    config = configure(schedule="constant", **changes)
    rate = make_schedule(config, total_steps=100, train_size=TRAIN_SIZE)
    decay = make_decay(config, rate)
    assert (decay(0) if decay else None) == (about(expected) if expected else None)
    if not decay or config.optim.name == "lamb":
        return
    optimizer = make_optimizer(config, rate)
    params = {"head": {"kernel": jnp.ones((1, 1))}}
    state, before = optimizer.init(params), 1.0
    # Momentum needs some steps to build up.
    for _ in range(150):
        before = params["head"]["kernel"]
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = optimizer.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
    lost = float(1 - params["head"]["kernel"][0, 0] / before[0, 0])
    # Correct to first order in the decay, for numbers near 1 in float32.
    assert lost == pytest.approx(expected, rel=2e-2, abs=2e-7)
