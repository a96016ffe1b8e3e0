"""Checkpoints: intact on any number of devices; the last few and the best are kept."""

import json
import math
import pathlib
import re
import resource
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.parallel import processes, sharding
from resnet_jax.persistence import checkpoints
from resnet_jax.persistence.array_checksums import fingerprint
from resnet_jax.persistence.checkpoints import DamagedError, open_checkpoints
from resnet_jax.training import programs
from tests.helpers import runs, tiny
from tests.helpers.checkpoints import (
    assert_same_bits,
    mesh_of,
    open_for_writing,
    progress_at,
    random_state,
    shapes_of,
)
from tests.helpers.system_calls import syncs_and_renames


@pytest.mark.slow
def test_a_state_can_be_restored_with_another_sharding_and_number_of_devices(tmp_path):
    setups = [
        tiny.setup(tiny.IN_PARTS | {"ema_decay": 0.9, "sharding.params": kind}, devices)
        for kind, devices in (
            *(("replicated", 8), ("fsdp", 8), ("fsdp", 4), ("replicated", 2)),
            *(("fsdp", 1), ("fsdp", 8)),
        )
    ]
    first = state = tiny.state(setups[0])
    for step, setup in enumerate(setups):
        with open_for_writing(tmp_path) as saved:
            saved.save(state, progress_at(step))
            saved.wait()
        with open_for_writing(tmp_path) as saved:
            state, _ = saved.restore_latest(programs.state_like(setup))
        assert_same_bits(state, first)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        assert shardings == programs.state_shardings(setup)
        assert fingerprint(state) == fingerprint(first)
        # The last kernel has the shape (3, 3, 64, 64).
        kernel = state.opt_state[1].trace["stage2_block1"]["conv2"]["kernel"]
        parts = setup.mesh.size if setup.config.sharding.params == "fsdp" else 1
        assert kernel.addressable_shards[0].data.shape == (3, 3, 64 // parts, 64)


@pytest.mark.slow
def test_a_state_is_restored_bit_for_bit_on_other_numbers_of_devices(tmp_path):
    state, devices = random_state(1, 8), (1, 4)
    with open_for_writing(tmp_path) as saved:
        saved.save(state, progress_at(1))
        saved.wait()
    for count in devices:
        with open_for_writing(tmp_path) as saved:
            restored, progress = saved.restore_latest(shapes_of(state, count))
        assert_same_bits(restored, state)
        assert restored.params["conv"]["kernel"].sharding.num_devices == count
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert progress == progress_at(1)


def test_the_last_checkpoints_and_the_best_one_are_kept(tmp_path):
    with open_for_writing(tmp_path) as saved:
        for step, top1 in ((1, 0.3), (2, 0.9), (3, None), (4, 0.5), (5, None)):
            saved.save(random_state(step), progress_at(step, top1))
        saved.wait()
        assert saved.steps() == [2, 4, 5]
        assert saved.best_step() == 2
    with open_for_writing(tmp_path) as saved:
        assert saved.best_step() == 2
        restored = saved.restore(2, shapes_of(random_state(2)))
    assert_same_bits(restored, random_state(2))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_an_evaluation_whose_loss_is_not_finite_is_never_the_best(tmp_path, loss):
    losses = {1: loss, 2: 1.0, 3: loss, 4: loss}
    with open_for_writing(tmp_path) as saved:
        for step, top1 in ((1, 0.9), (2, 0.1), (3, 0.8), (4, 0.7)):
            progress = progress_at(step, top1)
            progress.evaluation["loss"] = losses[step]
            saved.save(random_state(step), progress)
            saved.wait()
            assert saved.best_step() == (2 if step > 1 else None)
        assert saved.steps() == [2, 3, 4]
    with open_for_writing(tmp_path) as saved:
        assert saved.best_step() == 2


def test_a_step_can_be_saved_again_with_its_evaluation(tmp_path):
    with open_for_writing(tmp_path) as saved:
        saved.save(random_state(3), progress_at(3))
        saved.save(random_state(3), progress_at(3, 0.7))
        saved.wait()
        assert saved.best_step() == 3
        _, progress = saved.restore_latest(shapes_of(random_state(3)))
    assert progress.evaluation == {"top1": 0.7, "step": 3}


@pytest.mark.parametrize(("process", "small"), [(0, np.ndarray), (1, type(None))])
def test_small_arrays_are_written_by_process_0_alone(process, small, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: process)
    split = jax.sharding.NamedSharding(mesh_of(2), jax.P("data"))
    tree = {
        "small": jnp.ones(8),
        "large": jnp.ones((512, 512)),
        "sharded": jax.device_put(jnp.ones(8), split),
    }
    written = checkpoints._arrays_to_write(tree)
    assert isinstance(written.pop("small"), small)
    assert all(written[name] is tree[name] for name in ("large", "sharded"))


def test_a_process_whose_save_failed_does_not_wait_for_the_others(monkeypatch):
    calls = []
    client = types.SimpleNamespace(wait_at_barrier=lambda *call: calls.append(call))
    # A single process cannot have the two processes that this needs.
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(processes, "client", lambda: client)
    with pytest.raises(OSError, match="full"):
        try:
            raise OSError("full")
        finally:
            checkpoints._wait_at_barrier(key="saved", timeout_ms=1)
    assert not calls
    checkpoints._wait_at_barrier(key="saved", timeout_ms=1)
    assert calls == [("saved", 1)]


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (["2"], "the newest intact one is that of step 1. .* resumes from there"),
        (["1", "2"], "there is no older one. .* again: it starts again"),
    ],
)
def test_a_failed_save_names_a_checkpoint_that_is_still_there(
    tmp_path, removed, message
):
    folder = tmp_path / "checkpoints"
    save_evaluated(folder, {1: 0.1, 2: 0.2})
    with open_for_writing(folder, keep_best=9) as saved:
        for name in removed:
            shutil.rmtree(folder / name)
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, limit[1]))
        try:
            with pytest.raises(UserError, match=f"step 3 could not be .*{message}"):
                saved.save(random_state(3), progress_at(3))
                saved.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def save_evaluated(path, figures: dict[int, float]) -> None:
    """Saves a checkpoint with a top-1 accuracy at each step, and keeps all."""
    with open_for_writing(path, keep_best=9) as saved:
        for step, top1 in figures.items():
            saved.save(random_state(step), progress_at(step, top1))
        saved.wait()


def damage_arrays(checkpoint: pathlib.Path) -> None:
    """Removes the files that hold the arrays of a checkpoint."""
    for file in checkpoint.glob("state/ocdbt.process_0/d/*"):
        file.unlink()


def test_a_reader_sees_what_was_saved_since_it_was_opened(tmp_path):
    save_evaluated(tmp_path / "checkpoints", {1: 0.9})
    with open_checkpoints(tmp_path) as saved:
        assert saved.load("last")[0]["progress"]["step"] == 1
        save_evaluated(tmp_path / "checkpoints", {2: 0.8})
        record, arrays = saved.load("last")
        assert record["progress"]["step"] == 2
        assert_same_bits(arrays["params"], random_state(2).params)
        assert saved.load("best")[0]["progress"]["step"] == 1


def test_another_checkpoint_is_read_if_the_chosen_one_is_removed_meanwhile(tmp_path):
    save_evaluated(tmp_path / "checkpoints", {1: 0.9, 2: 0.8})
    # Another process removes the files of a checkpoint one after the other.
    damage_arrays(tmp_path / "checkpoints" / "1")
    removal = threading.Timer(0.3, shutil.rmtree, [tmp_path / "checkpoints" / "1"])
    removal.start()
    with open_checkpoints(tmp_path) as saved:
        assert saved.load("best")[0]["progress"]["step"] == 2
    removal.join()


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 10**5])
def test_the_newest_intact_checkpoint_is_read_if_a_record_is_damaged(tmp_path, content):
    save_evaluated(tmp_path / "checkpoints", {1: 0.9, 2: 0.9})
    record = tmp_path / "checkpoints" / "2" / "run" / "metadata"
    record.write_bytes(content)
    with open_checkpoints(tmp_path) as saved:
        assert saved.load("best")[0]["progress"]["step"] == 1
        with pytest.raises(DamagedError, match=r"move .*checkpoints/2 away to use"):
            saved.load("last")
    assert record.read_bytes() == content
    with open_for_writing(tmp_path / "checkpoints") as saved:
        _, progress = saved.restore_latest(shapes_of(random_state(1)))
    assert progress.step == 1
    assert (tmp_path / "damaged" / "2" / "run" / "metadata").read_bytes() == content


def test_a_damaged_best_checkpoint_is_not_replaced_by_another_one(tmp_path):
    save_evaluated(tmp_path / "checkpoints", {1: 0.9, 2: 0.8})
    damage_arrays(tmp_path / "checkpoints" / "1")
    with (
        open_checkpoints(tmp_path) as saved,
        pytest.raises(DamagedError, match=r"move .*checkpoints/1 away to use"),
    ):
        saved.load("best")


def test_an_evaluation_without_a_finite_loss_is_valid_json(tmp_path):
    progress = progress_at(1, 0.5)
    progress.evaluation["loss"] = math.inf
    with open_for_writing(tmp_path) as saved:
        saved.save(random_state(1), progress)
        saved.wait()

    def refuse(name):
        raise AssertionError(name)

    text = (tmp_path / "1" / "run" / "metadata").read_text()
    assert json.loads(text, parse_constant=refuse)
    with open_for_writing(tmp_path) as saved:
        _, restored = saved.restore_latest(shapes_of(random_state(1)))
    assert restored.evaluation["loss"] is None


READ = """
import sys, time
from resnet_jax.persistence.checkpoints import open_checkpoints
from resnet_jax.persistence.storage import path_of
end, count = time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    with open_checkpoints(path_of(sys.argv[1])) as saved:
        saved.load(("best", "last")[count % 2])
    count += 1
print(count, "loaded")
"""


@pytest.mark.slow
def test_checkpoints_can_be_read_while_their_run_replaces_them(tmp_path):
    step = 1
    with open_for_writing(tmp_path / "checkpoints", keep_last=1, keep_best=0) as saved:
        saved.save(random_state(step), progress_at(step, 0.5))
        saved.wait()
        reader = runs.start_python("-c", READ, str(tmp_path), "10")
        while reader.poll() is None:
            step += 1
            saved.save(random_state(step), progress_at(step, 0.5))
    code, output = runs.finish(reader)
    assert code == 0, output
    assert "Traceback" not in output
    assert int(re.search(r"(\d+) loaded", output)[1]) > 1
    assert step > 10


@pytest.mark.slow
def test_a_checkpoint_gets_its_name_when_it_and_the_rows_are_on_disk(tmp_path):
    """A power cut at any moment leaves a whole checkpoint and the rows before it."""
    workdir = tmp_path / "run"
    program = f"""
from tests.helpers import runs, tiny
from resnet_jax.training.loop import train
config = tiny.config()
with config.unlocked():
    config.checkpoint.every = {{"steps": 2}}
train(config, {str(workdir)!r})
"""
    calls = syncs_and_renames(program, workdir)
    for step in ("2", "4"):
        named = calls.index(("rename", f"checkpoints/{step}"))
        synced = {path for call, path in calls[:named] if call == "sync"}
        assert "metrics.jsonl" in synced
        writing = f"checkpoints/{step}.orbax-checkpoint-tmp/"
        before = {path.removeprefix(writing) for path in synced}
        assert {"state/_METADATA", "run/metadata", "state", "run"} <= before
        assert any(path.startswith("state/ocdbt.process_0/d/") for path in before)
        after = [path for call, path in calls[named:] if call == "sync"]
        assert "checkpoints" in after and f"checkpoints/{step}/run/metadata" in after
    named = calls.index(("rename", "result.json"))
    assert calls[named + 1] == ("sync", "")


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    with open_for_writing(tmp_path) as saved:
        assert saved.restore_latest(shapes_of(random_state(0))) is None
        assert saved.best_step() is None


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
def test_the_state_of_every_optimizer_is_restored(changes, tmp_path):
    # With stacked blocks, some optimizers keep one state per block.
    more = {"model.scan_blocks": True, "model.overrides.stage_sizes": (3, 1)}
    changes = {f"optim.{key}": value for key, value in changes.items()}
    setup = tiny.setup(changes | more, devices=2)
    shapes = programs.state_like(setup)
    # No value is one with which an optimizer starts.
    state = jax.tree.map(
        lambda x: (
            np.full(x.shape, 3, x.dtype)
            + np.arange(x.size, dtype=x.dtype).reshape(x.shape)
        ),
        shapes,
    )
    state = jax.device_put(state, sharding.replicated(setup.mesh))
    with open_for_writing(tmp_path) as saved:
        saved.save(state, progress_at(1))
        saved.wait()
    with open_for_writing(tmp_path) as saved:
        restored, _ = saved.restore_latest(shapes)
    assert_same_bits(restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
