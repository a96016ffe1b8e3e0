"""Runs can be loaded as weights, and a run can start from any weights."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from resnet_jax.convert import main
from resnet_jax.errors import UserError
from resnet_jax.models.inputs import normalize
from resnet_jax.models.scan import stack_blocks
from resnet_jax.persistence import storage
from resnet_jax.persistence.array_checksums import old_fingerprint
from resnet_jax.persistence.checkpoints import Checkpoints, Progress
from resnet_jax.reports import curves
from resnet_jax.training import programs
from resnet_jax.training.experiment import Experiment, set_up
from resnet_jax.training.initialization import (
    first_state,
    initial_weights,
    teacher_variables,
    teacher_weights,
)
from resnet_jax.training.loop import train
from resnet_jax.training.resume import describe_data, describe_weights, run_checkpoints
from resnet_jax.training.step import TrainState
from resnet_jax.weights.card import default_card
from resnet_jax.weights.load import load
from resnet_jax.weights.save import save
from tests.helpers import keyed, small_networks, tiny


def write_run(workdir, changes=None, devices: int = 4) -> Experiment:
    """Writes a workdir as a run does, with its best checkpoint and a later one."""
    setup = tiny.setup(changes, devices)
    workdir.mkdir(exist_ok=True)
    storage.write_json(workdir / "config.json", setup.config.to_dict())
    with run_checkpoints(setup, workdir) as saved:
        saved.about |= {
            "data": describe_data(setup.train.source, setup.eval.source),
            "init": describe_weights(setup.config.init_from, initial_weights(setup)),
            "teacher": None,
        }
        for step, top1 in ((1, 0.75), (2, 0.5)):
            evaluation = {"top1": top1, "step": step}
            progress = Progress(step=step, evaluation=evaluation)
            saved.save(state_of(setup, seed=step), progress)
        saved.wait()
    return setup


def state_of(setup: Experiment, seed: int) -> TrainState:
    """Returns a state of keyed values in the layout of the setup's network."""
    spec = setup.model.spec
    variables, ema = keyed.variables(spec, seed), keyed.variables(spec, seed + 10)
    if setup.model.scan_blocks:
        variables = stack_blocks(variables, spec)
    state = TrainState(
        step=np.int32(0),
        **variables,
        opt_state=setup.optimizer.init(variables["params"]),
        ema=ema if setup.config.ema_decay else None,
    )
    return jax.device_put(state, programs.state_shardings(setup))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "seed"),
    [
        ({}, 1),
        ({"ema_decay": 0.9}, 11),
        ({"model.scan_blocks": True, "model.overrides.stage_sizes": (3, 1)}, 1),
        (tiny.IN_PARTS, 1),
    ],
    ids=["plain", "ema", "scanned", "sharded"],
)
def test_a_workdir_gives_the_variables_of_its_best_evaluation(tmp_path, changes, seed):
    setup = write_run(tmp_path, changes)
    card, variables = load(str(tmp_path))
    small_networks.assert_equal(variables, keyed.variables(setup.model.spec, seed))
    assert card.make_spec() == setup.model.spec
    assert (card.image_size, card.mean, card.crop_fraction) == (8, (0.5,), 1.0)
    assert card.classes == setup.classes
    assert card.top1 == 75.0


def test_a_workdir_is_converted_under_the_names_of_timm(tmp_path):
    setup = write_run(tmp_path)
    target = tmp_path / "w.safetensors"
    main(["convert", str(tmp_path), str(target)])
    card, variables = load(str(target))
    assert card.scheme == "timm"
    small_networks.assert_equal(variables, keyed.variables(setup.model.spec, 1))


def test_a_workdir_without_a_checkpoint_is_rejected(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    config = tiny.config()
    storage.write_json(tmp_path / "config.json", config.to_dict())
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        load(str(tmp_path))


def test_a_checkpoint_whose_values_changed_is_rejected(tmp_path):
    setup = write_run(tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as saved:
        record = saved.read(1)
    # The record of an older version has no checksum of itself.
    name = "params/head/bias"
    record["fingerprint"] = old_fingerprint(state_of(setup, seed=1))
    path = tmp_path / "checkpoints" / "1" / "run" / "metadata"
    path.write_text(json.dumps(record))
    load(str(tmp_path))
    record["fingerprint"][name] ^= 1
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"{name} do not match.*use another"):
        load(str(tmp_path))


def weights_for(tmp_path, setup: Experiment, **fields) -> tuple[str, dict]:
    """Writes keyed weights of the setup's network; returns their path and values.

    Keyword arguments replace fields of its spec.
    """
    spec = dataclasses.replace(setup.model.spec, **fields)
    variables = keyed.variables(spec, seed=7)
    card = default_card(setup.config.model.name, spec, classes=())
    path = str(tmp_path / "w.safetensors")
    save(path, variables, card)
    return path, variables


@pytest.mark.slow
def test_the_first_loss_of_a_run_is_that_of_its_initial_weights(tmp_path):
    changes = {"ema_decay": 0.9, "model.bn_group_size": "global"}
    setup = tiny.setup(changes | tiny.IN_PARTS, devices=2)
    path, variables = weights_for(tmp_path, setup)
    setup.config.init_from = path
    state = first_state(setup, initial_weights(setup))
    started = {"params": state.params, "batch_stats": state.batch_stats}
    small_networks.assert_equal(jax.device_get(started), variables)
    small_networks.assert_equal(jax.device_get(state.ema), variables)

    batch = tiny.batch(setup)
    placed = setup.to_devices(batch)
    _, metrics = programs.compile_train_step(setup)(state, placed)
    data = setup.config.data
    images = normalize(jnp.asarray(batch["image"]), data.mean, data.std, jnp.float32)
    logits, _ = setup.model.apply(
        variables, images, train=True, mutable=["batch_stats"]
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    # Float32 sums are taken in another order.
    np.testing.assert_allclose(metrics["loss"], loss.mean(), rtol=1e-5)
    # The step may overwrite its donated state, but not the weights.
    small_networks.assert_equal(variables, keyed.variables(setup.model.spec, seed=7))


def test_a_new_head_is_initialised_by_the_seed_of_the_run(tmp_path, caplog):
    setup = tiny.setup({"seed": 3}, devices=1)
    path, variables = weights_for(tmp_path, setup, num_classes=4)
    head = programs.init_state(setup).params["head"]
    setup.config.init_from = path
    params = first_state(setup, initial_weights(setup)).params
    assert "4 classes; the head for 10 is randomly initialised" in caplog.text
    small_networks.assert_equal(jax.device_get(params["head"]), jax.device_get(head))
    np.testing.assert_array_equal(
        params["stem_conv1"]["kernel"], variables["params"]["stem_conv1"]["kernel"]
    )


def test_a_scanned_network_starts_from_the_same_weights(tmp_path):
    changes = {"model.scan_blocks": True, "model.overrides.stage_sizes": (3, 1)}
    setup = tiny.setup(changes, devices=1)
    path, variables = weights_for(tmp_path, setup)
    setup.config.init_from = path
    stacked = stack_blocks(variables, setup.model.spec)
    state = first_state(setup, initial_weights(setup))
    small_networks.assert_equal(jax.device_get(state.params), stacked["params"])


def test_a_run_does_not_start_from_weights_of_another_network(tmp_path):
    setup = tiny.setup(devices=1)
    setup.config.init_from, _ = weights_for(tmp_path, setup, stage_sizes=(1, 2))
    with pytest.raises(UserError, match=r"w\.safetensors does not fit .*layer2\.1"):
        first_state(setup, initial_weights(setup))


def test_a_run_resumes_without_its_initial_weights(tmp_path, monkeypatch):
    changes = {"total": {"steps": 2}}
    path, _ = weights_for(tmp_path, tiny.setup(changes))
    changes["init_from"] = path
    write_run(tmp_path / "run", changes)
    pathlib.Path(path).unlink()
    # This workdir has no metrics that a report could be drawn of.
    monkeypatch.setattr(curves, "draw", lambda workdir: workdir)
    assert train(tiny.config(changes), tmp_path / "run")["step"] == 2


# Distillation.


def test_a_finished_run_can_be_a_teacher(tmp_path):
    teacher = write_run(tmp_path, {"ema_decay": 0.9})
    changes = {
        "distill.teacher": teacher.config.model.name,
        "distill.teacher_init": str(tmp_path),
    }
    config = tiny.config(changes)
    with config.unlocked():
        config.distill.overrides = dict(tiny.NETWORK)
    setup = set_up(config)
    variables = teacher_variables(setup, teacher_weights(setup))
    # These are the EMA of the best checkpoint.
    expected = keyed.variables(teacher.model.spec, 11)
    small_networks.assert_equal(jax.device_get(variables), expected)
    # The train step takes them as its teacher.
    batch = setup.to_devices(tiny.batch(setup))
    train_step = programs.compile_train_step(setup, variables)
    _, metrics = train_step(tiny.state(setup), batch)
    assert np.isfinite(metrics["loss"])


def test_a_teacher_for_other_classes_is_rejected(tmp_path):
    teacher = write_run(tmp_path, {"data.source": "fake:12:64"})
    config = tiny.config(
        {
            "distill.teacher": teacher.config.model.name,
            "distill.teacher_init": str(tmp_path),
        }
    )
    with config.unlocked():
        config.distill.overrides = dict(tiny.NETWORK)
    match = r"distill\.teacher_init=.* num_classes=12, .*\(model\.name=.* 10;"
    with pytest.raises(UserError, match=match):
        teacher_weights(set_up(config))
