"""Checkpoints: whole, on any number of devices, the last few and the best."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax.parallel import processes, sharding
from resnet_jax.persistence import checkpoints
from resnet_jax.persistence.checkpoints import Checkpoints, Progress
from resnet_jax.persistence.fingerprint import fingerprint
from resnet_jax.training import programs
from resnet_jax.training.step import TrainState
from tests.helpers import tiny


def mesh_of(count: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:count]), ("data",))


def state_of(seed: int, devices: int = 1) -> TrainState:
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 4, 8))},
        "head": {"bias": jax.random.normal(keys[1], (8,))},
    }
    state = TrainState(
        step=jnp.int32(seed),
        params=params,
        batch_stats={"norm": {"mean": jax.random.normal(keys[2], (8,))}},
        opt_state=(jax.tree.map(lambda x: 2 * x, params), ()),
        ema=None,
    )
    return jax.device_put(state, sharding.replicated(mesh_of(devices)))


def like(state: TrainState, devices: int) -> TrainState:
    placed = sharding.replicated(mesh_of(devices))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), state
    )


def open_at(path, **options) -> Checkpoints:
    return Checkpoints(
        path, ConfigDict({"keep_last": 2, "keep_best": 1, **options}), {}
    )


def progress_at(step: int, top1: float | None = None) -> Progress:
    evaluation = None if top1 is None else {"top1": top1, "step": step}
    return Progress(step=step, examples=8 * step, evaluation=evaluation)


def assert_equal(state, other):
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.slow
def test_a_state_moves_between_whole_and_in_parts_and_numbers_of_devices(tmp_path):
    setups = [
        tiny.setup(tiny.IN_PARTS | {"ema_decay": 0.9, "sharding.params": kind}, devices)
        for kind, devices in (
            *(("replicated", 8), ("fsdp", 8), ("fsdp", 4), ("replicated", 2)),
            *(("fsdp", 1), ("fsdp", 8)),
        )
    ]
    first = state = tiny.state(setups[0])
    for step, setup in enumerate(setups):
        with open_at(tmp_path) as saved:
            saved.save(state, progress_at(step))
            saved.wait()
        with open_at(tmp_path) as saved:
            state, _ = saved.restore_latest(programs.state_like(setup))
        assert_equal(state, first)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        assert shardings == programs.state_shardings(setup)
        assert fingerprint(state) == fingerprint(first)
        # The last kernel of 3 x 3 x 64 x 64.
        kernel = state.opt_state[1].trace["stage2_block1"]["conv2"]["kernel"]
        parts = setup.mesh.size if setup.config.sharding.params == "fsdp" else 1
        assert kernel.addressable_shards[0].data.shape == (3, 3, 64 // parts, 64)


@pytest.mark.slow
def test_a_state_comes_back_with_the_same_bits_on_other_numbers_of_devices(tmp_path):
    state, devices = state_of(1, 8), (1, 4)
    with open_at(tmp_path) as saved:
        saved.save(state, progress_at(1))
        saved.wait()
    for count in devices:
        with open_at(tmp_path) as saved:
            restored, progress = saved.restore_latest(like(state, count))
        assert_equal(restored, state)
        assert restored.params["conv"]["kernel"].sharding.num_devices == count
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert progress == progress_at(1)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    with open_at(tmp_path) as saved:
        for step, top1 in ((1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, None)):
            saved.save(state_of(step), progress_at(step, top1))
        saved.wait()
        assert saved.steps() == [2, 4, 5]
        assert saved.best_step() == 2
    with open_at(tmp_path) as saved:
        assert saved.best_step() == 2
        restored = saved.restore(2, like(state_of(2), 1))
    assert_equal(restored, state_of(2))


def test_a_step_can_be_saved_again_with_its_evaluation(tmp_path):
    with open_at(tmp_path) as saved:
        saved.save(state_of(3), progress_at(3))
        saved.save(state_of(3), progress_at(3, 0.7))
        saved.wait()
        assert saved.best_step() == 3
        _, progress = saved.restore_latest(like(state_of(3), 1))
    assert progress.evaluation == {"top1": 0.7, "step": 3}


@pytest.mark.parametrize(("process", "small"), [(0, np.ndarray), (1, type(None))])
def test_small_arrays_are_written_by_process_0_alone(process, small, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    placed = jax.sharding.NamedSharding(mesh_of(2), jax.P("data"))
    tree = {
        "small": jnp.ones(8),
        "large": jnp.ones((512, 512)),
        "in parts": jax.device_put(jnp.ones(8), placed),
    }
    written = checkpoints._written_here(tree)
    assert isinstance(written.pop("small"), small)
    assert all(written[name] is tree[name] for name in ("large", "in parts"))


def test_a_process_whose_save_failed_does_not_wait_for_the_others(monkeypatch):
    waited = []
    client = types.SimpleNamespace(wait_at_barrier=lambda *call: waited.append(call))
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "client", lambda: client)
    with pytest.raises(OSError, match="full"):
        try:
            raise OSError("full")
        finally:
            checkpoints._meet(key="saved", timeout_ms=1)
    assert not waited
    checkpoints._meet(key="saved", timeout_ms=1)
    assert waited == [("saved", 1)]


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    with open_at(tmp_path) as saved:
        assert saved.restore_latest(like(state_of(0), 1)) is None
        assert saved.best_step() is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_a_fingerprint_changes_with_any_bit_and_with_places(dtype):
    x = np.arange(24).reshape(4, 6) % 2 if dtype == jnp.bool_ else np.arange(24)
    x = np.array(jnp.asarray(x, dtype)).reshape(4, 6)

    def of(array):
        return fingerprint({"x": jnp.asarray(array)})["x"]

    changed = {of(x)}
    for place in range(x.nbytes):
        raw = bytearray(x.tobytes())
        # In a boolean only the lowest bit is one.
        raw[place] ^= 1
        changed.add(of(np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)))
    assert len(changed) == 1 + x.nbytes
    swapped = x.copy()
    swapped[0, 0], swapped[0, 1] = x[0, 1], x[0, 0]
    assert of(swapped) != of(x)


def test_a_fingerprint_does_not_depend_on_the_devices():
    assert fingerprint(state_of(5, 8)) == fingerprint(state_of(5, 1))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "lars", "layer_decay": 0.9},
        {"name": "lamb", "weight_decay_exclude": "norm+bias"},
        {"name": "adamw", "decay": "decoupled"},
        {"name": "rmsprop_tf", "schedule": "plateau"},
        {"decay": "schedule", "agc": 0.01},
    ],
    ids=str,
)
def test_the_state_of_every_optimiser_comes_back(changes, tmp_path):
    # Stacked blocks: some of these keep their state by single ones.
    more = {"model.scan_blocks": True, "model.overrides.stage_sizes": (3, 1)}
    changes = {f"optim.{key}": value for key, value in changes.items()}
    setup = tiny.setup(changes | more, devices=2)
    shapes = programs.state_like(setup)
    # Values of which none is where an optimiser starts.
    state = jax.tree.map(
        lambda x: (
            np.full(x.shape, 3, x.dtype)
            + np.arange(x.size, dtype=x.dtype).reshape(x.shape)
        ),
        shapes,
    )
    state = jax.device_put(state, sharding.replicated(setup.mesh))
    with open_at(tmp_path) as saved:
        saved.save(state, progress_at(1))
        saved.wait()
    with open_at(tmp_path) as saved:
        restored, _ = saved.restore_latest(shapes)
    assert_equal(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
