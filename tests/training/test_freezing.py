"""Freezing: what stays, what trains, names, the thaw, and resumes on both sides."""

import pathlib
import re
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.models.inputs import normalize
from resnet_jax.persistence.checkpoints import open_checkpoints
from resnet_jax.training import optim, programs
from resnet_jax.training.experiment import Experiment, set_up
from resnet_jax.training.freezing import NOTHING, frozen_of
from resnet_jax.training.loop import train
from resnet_jax.training.precise_bn import precise_batch_norm
from resnet_jax.training.step import TrainState
from tests.helpers import tiny

STEM = {"optim.freeze": "up_to_stage1"}
HEAD = {"optim.freeze": "all_but_head"}
SCAN = {"model.scan_blocks": True, "model.overrides.stage_sizes": (3, 1)}


def leaves(state: TrainState) -> dict[tuple, np.ndarray]:
    """Returns the arrays of parameters, statistics and EMA by path."""
    trees = {"params": state.params, "batch_stats": state.batch_stats}
    return flatten_dict(jax.device_get(trees | {"ema": state.ema or {}}))


def steps(changes: dict, count: int = 20, devices: int = 8):
    """Returns the experiment, and the arrays before and after some steps."""
    setup = tiny.setup({"total": ConfigDict({"steps": 100})} | changes, devices)
    train_step = programs.compile_train_step(setup)
    # The helper draws single blocks.
    scans = setup.config.model.scan_blocks
    values = programs.init_state(setup) if scans else tiny.state(setup)
    before = leaves(values)
    for number in range(count):
        values, _ = train_step(values, setup.to_devices(tiny.batch(setup, number)))
    return setup, before, leaves(values)


def is_frozen(setup: Experiment, path: tuple) -> bool:
    name = path[2:] if path[0] == "ema" else path[1:]
    return name in setup.freeze.leaves


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.name": "sgd", "ema_decay": 0.9},
        {"optim.name": "adamw", "optim.decay": "decoupled", "optim.layer_decay": 0.7},
        {"optim.name": "lamb", "ema_decay": 0.9, "ema_every": 3, "ema_warmup": "copy"},
        {"optim.name": "lars", "optim.clip_norm": 1.0, "optim.head_learning_rate": 1.0},
        {"optim.name": "rmsprop_tf", "optim.learning_rate": 1e-3},
        {"model.dtype": "bfloat16", "ema_decay": 0.9},
        {"batch_size": 48, "optim.microbatches": 3, "ema_decay": 0.9},
        {"optim.sam_rho": 0.1, "optim.agc": 0.1, "mix.mixup_alpha": 0.2},
        tiny.IN_PARTS | {"ema_decay": 0.9},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)
@pytest.mark.slow
def test_what_is_frozen_keeps_every_bit_and_all_else_changes(changes):
    setup, before, after = steps(STEM | changes)
    assert {is_frozen(setup, path) for path in before} == {True, False}
    for path, old in before.items():
        if is_frozen(setup, path):
            assert old.tobytes() == after[path].tobytes(), path
        else:
            assert not np.array_equal(old, after[path]), path


def test_the_optimiser_keeps_no_state_of_what_is_frozen():
    setup = tiny.setup(HEAD | {"optim.name": "adam"})
    shapes = [x.shape for x in jax.tree.leaves(programs.state_like(setup).opt_state)]
    # The moments of the head's kernel and bias, Adam's counter and the schedule's.
    assert sorted(shapes) == [(), (), (10,), (10,), (16, 10), (16, 10)]


def test_the_backward_pass_of_what_is_frozen_is_gone():
    def convolutions(changes: dict) -> int:
        lowered = programs.lower_train_step(tiny.setup(changes, 1))
        text = lowered.compile().as_text()
        return len(re.findall(r" = \S+ (?:convolution|custom-call)\(", text))

    def cost(changes: dict) -> tuple[float, int]:
        compiled = programs.compile_train_step(tiny.setup(changes, 1))
        stats = compiled.memory_analysis()
        return compiled.cost_analysis()["flops"], stats.temp_size_in_bytes

    # The stem, two convolutions of two blocks and a projection.
    assert convolutions(HEAD) < convolutions(STEM) < convolutions({})
    (flops, memory), (all_flops, all_memory) = cost(HEAD), cost({})
    # A forward pass is a third of a step.
    assert flops < 0.5 * all_flops
    assert memory < all_memory


@pytest.mark.parametrize("freeze", ["up_to_stage1", "*norm*", "all_but_head"])
def test_gradients_are_those_of_the_network_with_norms_in_evaluation(freeze):
    # With a momentum but no decay, the first momentum is the gradient.
    changes = {"optim.freeze": freeze, "optim.weight_decay": 0.0}
    setup = tiny.setup(changes, 1)
    values, batch = tiny.state(setup), tiny.batch(setup)
    before = jax.device_get(values)
    trained, _ = programs.compile_train_step(setup)(values, setup.to_devices(batch))
    got = {
        tuple(key.key for key in path if hasattr(key, "key")): grad
        for path, grad in jax.tree_util.tree_leaves_with_path(trained.opt_state)
        if any(hasattr(key, "key") for key in path)
    }
    data = setup.config.data
    image = normalize(jnp.asarray(batch["image"]), data.mean, data.std, jnp.float32)

    # The reference differentiates by all parameters.
    early = ("stem_norm1",), ("stage1_block1",)

    def loss_of(params):
        def frozen_norm(method, args, kwargs, context):
            path = context.module.path
            is_frozen = freeze != "up_to_stage1" or path[:1] in early
            if is_frozen and path and "norm" in path[-1]:
                kwargs = {**kwargs, "train": False}
            return method(*args, **kwargs)

        with nn.intercept_methods(frozen_norm):
            variables = {"params": params, "batch_stats": before.batch_stats}
            logits, _ = setup.model.apply(
                variables, image, train=True, mutable=["batch_stats"]
            )
        labels = jnp.asarray(batch["label"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    expected = flatten_dict(jax.grad(loss_of)(before.params))
    assert set(got) == {x for x in expected if x not in setup.freeze.leaves}
    for path, grad in got.items():
        # Float32 sums in another order.
        assert tiny.difference(grad, expected[path]) < 2e-5, path


# Names.


def frozen_names(freeze: str, network: str = "resnet18", **fields) -> set[str]:
    """Returns the names of the frozen parameters and statistics of a network."""
    config = tiny.config({"optim.freeze": freeze, "model.name": network})
    frozen = frozen_of(config, create_model(network, num_classes=10, **fields))
    return {"/".join(path) for path in frozen.leaves}


def test_up_to_a_stage_freezes_the_stem_and_the_stages_before():
    names = frozen_names("up_to_stage2")
    modules = {name.split("/")[0] for name in names}
    blocks = {f"stage{i}_block{j}" for i in (1, 2) for j in (1, 2)}
    assert modules == {"stem_conv1", "stem_norm1", *blocks}
    assert {"stem_norm1/mean", "stem_norm1/var", "stem_norm1/scale"} <= names


@pytest.mark.parametrize("network", ["highway19", "resnetv2_50", "plain20"])
def test_all_but_the_head_leaves_only_the_head(network):
    model = create_model(network, num_classes=10)
    config = tiny.config({"data.image_size": 64, "model.name": network} | HEAD)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, 64, 64, model.spec.in_channels))
    )
    frozen = frozen_of(config, model)
    left = frozen.trained(shapes["params"])
    names = {path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(left)}
    assert names == {"head"}
    assert not jax.tree.leaves(frozen.trained(shapes.get("batch_stats", {})))


def test_a_wildcard_does_not_continue_a_number():
    names = frozen_names("stage3_block1*", "resnet50")
    assert {name.split("/")[0] for name in names} == {"stage3_block1"}
    names = frozen_names("stage3_block1*", "resnet101")
    assert {name.split("/")[0] for name in names} == {"stage3_block1"}
    names = frozen_names("stage3_block1?,stem_conv1/kernel", "resnet101")
    assert {name.split("/")[0] for name in names} == {
        "stem_conv1",
        *(f"stage3_block{j}" for j in range(10, 20)),
    }


def test_a_norm_is_frozen_if_all_of_its_parameters_are():
    assert "stem_norm1/mean" not in frozen_names("stem_norm1/scale")
    assert "stem_norm1/mean" in frozen_names("stem_norm1/scale, stem_norm1/bias")


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("stage1_blok1*", r"'stage1_blok1\*'.*Did you mean .*stage1_block1"),
        ("all_but_haed", r"mean all_but_head"),
        ("up_to_stage9", r"'up_to_stage9'.*mean up_to_stage"),
        ("*", r"every parameter of resnet18.*all_but_head"),
        ("stem*,,head", r"no parameter matches ''"),
    ],
)
def test_a_freeze_that_makes_no_sense_is_an_error_that_names_a_way_out(freeze, message):
    with pytest.raises(UserError, match=message):
        frozen_names(freeze)


def test_merged_blocks_are_frozen_together_or_not_at_all():
    part = SCAN | {"optim.freeze": "stage1_block2"}
    with pytest.raises(UserError, match=r"stage1_block1to3.*model\.scan_blocks=True"):
        set_up(tiny.config(part))
    _, before, after = steps(SCAN | STEM, count=2, devices=1)
    path = ("batch_stats", "stage1_block1to3", "norm1", "mean")
    assert before[path].tobytes() == after[path].tobytes()
    other = ("batch_stats", "stage2_block1", "norm1", "mean")
    assert not np.array_equal(before[other], after[other])


# Precise batch norm.


@pytest.mark.slow
def test_precise_batch_norm_leaves_statistics_that_were_frozen_in_the_last_step():
    config = tiny.config(STEM | {"precise_bn": 3, "ema_decay": 0.9})
    config.optim.freeze_until = ConfigDict({"steps": 3})
    setup = set_up(config, tiny.mesh_of(1))
    # A run can end early, before the thaw.
    for step, frozen in ((3, setup.freeze), (4, NOTHING)):
        values = tiny.state(setup, step)
        before = leaves(values)
        after = leaves(precise_batch_norm(setup, values, after_batch=lambda: None))
        for path in [path for path in before if "batch_stats" in path]:
            same = before[path].tobytes() == after[path].tobytes()
            name = path[2:] if path[0] == "ema" else path[1:]
            assert same == (name in frozen.leaves), path


# The thaw.


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.name": "adam"},
        {"optim.name": "sgd"},
        {"optim.name": "rmsprop_tf"},
        # The optimiser sees single blocks, and the network merged ones.
        {"optim.name": "lamb"} | SCAN,
    ],
    ids=lambda changes: changes["optim.name"],
)
def test_what_thaws_starts_with_the_optimisers_first_state(changes):
    """The first update after a thaw is the first one of a new run."""
    config = tiny.config(HEAD | changes)
    config.optim.freeze_until = ConfigDict({"steps": 2})
    config.optim.schedule = "constant"
    setup = set_up(config, tiny.mesh_of(1))
    values = programs.init_state(setup)
    train_step = programs.compile_train_step(setup)
    for number in range(2):
        values, _ = train_step(values, setup.to_devices(tiny.batch(setup, number)))
    thawed = programs.thaw(setup, values)
    plain = set_up(tiny.config(changes | {"optim.schedule": "constant"})).optimizer
    grads = jax.tree.map(lambda x: 0.1 + jnp.cos(x), thawed.params)
    got, _ = setup.optimizer.update(grads, thawed.opt_state, thawed.params)
    fresh = plain.init(thawed.params)
    expected, _ = plain.update(grads, fresh, thawed.params)
    for part in got.keys() - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, got[part], expected[part])
    assert tiny.difference(got["head"], expected["head"]) > 1e-3


def config_of_thaw(until: int | None = 3, total: int = 6, **changes) -> ConfigDict:
    config = tiny.config(HEAD | {"optim.name": "adam", "ema_decay": 0.9} | changes)
    config.total = ConfigDict({"steps": total})
    config.optim.schedule = "constant"
    if until is not None:
        config.optim.freeze_until = ConfigDict({"steps": until})
    config.log_every = ConfigDict({"steps": 1})
    config.evaluate.every = ConfigDict({"steps": 3})
    config.checkpoint.every = ConfigDict({"steps": 1})
    config.checkpoint.keep_last = 10
    return config


def stopping_at(step: int) -> Callable[[dict], None]:
    def stop(result: dict) -> None:
        if result["step"] == step:
            raise KeyError(step)

    return stop


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_run_resumes_bit_for_bit_before_at_and_after_the_thaw(tmp_path, at):
    config = config_of_thaw()
    config.evaluate.every = ConfigDict({"steps": 1})
    train(config, tmp_path / "whole")
    with pytest.raises(KeyError):
        train(config, tmp_path / "cut", callback=stopping_at(at))
    train(config, tmp_path / "cut")
    whole, cut = (_arrays(config, tmp_path / part, step=6) for part in ("whole", "cut"))
    assert [x.tobytes() for x in whole] == [x.tobytes() for x in cut]


def _arrays(config: ConfigDict, workdir: pathlib.Path, step: int) -> list[np.ndarray]:
    return jax.tree.leaves(jax.device_get(_state(config, workdir, step)))


def _state(config: ConfigDict, workdir: pathlib.Path, step: int) -> TrainState:
    experiment = set_up(config)
    with open_checkpoints(workdir) as saved:
        return saved.restore(step, programs.state_like(experiment, step - 1))


@pytest.mark.slow
def test_a_damaged_checkpoint_after_the_thaw_falls_back_to_one_before_it(tmp_path):
    config = config_of_thaw()
    train(config, tmp_path / "run")
    expected = _arrays(config, tmp_path / "run", 6)
    for step in (4, 5, 6):
        (tmp_path / f"run/checkpoints/{step}/run/metadata").write_text("{")
    train(config, tmp_path / "run")
    again = _arrays(config, tmp_path / "run", 6)
    assert [x.tobytes() for x in expected] == [x.tobytes() for x in again]


@pytest.mark.slow
def test_freezing_as_long_as_the_run_is_freezing_the_whole_run(tmp_path):
    ends = []
    for name, until in (("as_long", 4), ("longer", 9), ("whole", None)):
        config = config_of_thaw(until, total=4)
        train(config, tmp_path / name)
        values = leaves(_state(config, tmp_path / name, 4))
        ends.append({path: x.tobytes() for path, x in values.items()})
    assert ends[0] == ends[1] == ends[2]


@pytest.mark.slow
def test_a_longer_run_thaws_where_a_shorter_one_ended(tmp_path):
    train(config_of_thaw(4, total=4), tmp_path / "extended")
    longer = config_of_thaw(4, total=6)
    train(longer, tmp_path / "extended")
    train(longer, tmp_path / "whole")
    first, second = (_arrays(longer, tmp_path / x, 6) for x in ("extended", "whole"))
    assert [x.tobytes() for x in first] == [x.tobytes() for x in second]


@pytest.mark.slow
def test_a_run_does_not_resume_with_another_freeze(tmp_path):
    train(config_of_thaw(3, total=4), tmp_path / "run")
    for changes in (
        {"optim.freeze": "up_to_stage1"},
        {"optim.head_learning_rate": 1.0},
    ):
        with pytest.raises(UserError, match=next(iter(changes)).replace(".", r"\.")):
            train(config_of_thaw(3, total=4, **changes), tmp_path / "run")
    with pytest.raises(UserError, match=r"optim\.freeze_until"):
        train(config_of_thaw(2, total=4), tmp_path / "run")


def test_a_thaw_at_step_0_freezes_nothing():
    assert set_up(config_of_thaw(0)).freeze == NOTHING


# The head's learning rate.


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("sgd", "coupled"),
        ("adamw", "decoupled"),
        ("sgd", "schedule"),
        ("lars", "coupled"),
    ],
)
def test_the_head_learns_as_with_its_own_rate_for_all(name, decay):
    """The head's update equals that of an optimiser whose rate is the head's."""
    changes = {"optim.name": name, "optim.decay": decay, "optim.weight_decay": 0.01}

    def updates(rate: float, head_rate: float):
        config = tiny.config(
            changes
            | {"optim.learning_rate": rate, "optim.head_learning_rate": head_rate}
        )
        peak = rate * config.batch_size / config.optim.learning_rate_batch
        optimizer = optim.make_optimizer(
            config, optax.linear_schedule(0.1 * peak, peak, 4)
        )
        params = {
            "stem_conv1": {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4)},
            "head": {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3)},
        }
        values = optimizer.init(params)
        found = []
        for step in range(3):
            grads = jax.tree.map(lambda x, step=step: jnp.cos(x + step), params)
            change, values = optimizer.update(grads, values, params)
            found.append(change)
        return found

    for both, trunk, head in zip(
        updates(0.1, 0.5), updates(0.1, 0.0), updates(0.5, 0.0), strict=True
    ):
        # A factor rounds once.
        assert tiny.difference(both["head"], head["head"]) < 1e-6
        assert tiny.difference(both["stem_conv1"], trunk["stem_conv1"]) == 0


def test_a_rate_of_the_head_without_one_of_the_rest_is_an_error():
    config = tiny.config({"optim.learning_rate": 0.0, "optim.head_learning_rate": 0.1})
    with pytest.raises(UserError, match=r"optim\.freeze=all_but_head"):
        optim.check(config)
