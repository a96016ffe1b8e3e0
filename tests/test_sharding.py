"""What lies where; the number of devices changes neither result nor group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax import sharding
from resnet_jax.errors import UserError
from resnet_jax.models.cost import count
from resnet_jax.plan import hlo
from resnet_jax.plan.hlo import Collective
from resnet_jax.setup import Setup
from tests import tiny

# One block: the stem's norm and two more.
ONE_BLOCK = {"model.overrides.stage_sizes": (1,), "model.overrides.widths": (8,)}


@functools.cache
def two_steps(group: int | str, devices: int) -> dict:
    """State and metrics after two steps of 16 images, from a fixed state."""
    setup = tiny.setup(ONE_BLOCK | {"model.bn_group_size": group}, devices)
    train_step = setup.compile_train_step()
    state = tiny.state(setup)
    for seed in range(2):
        batch = setup.to_devices(tiny.batch(setup, seed))
        state, metrics = train_step(state, batch)
    return jax.device_get({**vars(state), **metrics})


# Of 16 images, 8 devices hold two each: groups of one inside a device, of two as a
# device holds them, of four over two devices, and one over all.
@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 8])
@pytest.mark.parametrize("group", [1, 2, 4, "global"])
def test_a_step_gives_the_same_on_any_number_of_devices(group, devices):
    alone, together = two_steps(group, 1), two_steps(group, devices)
    # The same float32 sums in another order. The longest are of 16 x 64 terms, which
    # makes sqrt(1024) x 2^-24 = 2e-6, through six layers and back.
    assert tiny.difference(together, alone) < 2e-5


def test_the_group_size_does_change_the_step():
    # By more than the bound above, which could not fail otherwise.
    for one, other in ((1, 2), (2, 4), (4, "global")):
        assert tiny.difference(two_steps(one, 1), two_steps(other, 1)) > 1e-2


# Communication, as the compiler planned it.


def collectives(compiled) -> list[Collective]:
    return hlo.collectives(compiled.as_text())


def compile_forward(setup: Setup):
    """Logits in training mode, and nothing else, so only norms need other devices."""

    def forward(variables, image):
        logits, _ = setup.model.apply(
            variables, image, train=True, mutable=["batch_stats"]
        )
        return logits

    like = setup.batch_like(setup.config.batch_size, "image")["image"]
    image = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.sharding)
    jitted = jax.jit(forward, out_shardings=sharding.batch_sharding(setup.mesh))
    return jitted.lower(setup.state_like().evaluated(), image).compile()


@pytest.mark.parametrize("group", [1, 2, "device"])
def test_groups_inside_a_device_need_no_communication(group):
    setup = tiny.setup({"model.bn_group_size": group})
    assert collectives(compile_forward(setup)) == []


@pytest.mark.parametrize(("group", "devices"), [(4, 2), (8, 4), ("global", 8)])
def test_groups_over_devices_communicate_inside_the_group_only(group, devices):
    setup = tiny.setup({"model.bn_group_size": group})
    found = collectives(compile_forward(setup))
    assert {(one.kind, one.devices) for one in found} == {("all-reduce", devices)}
    # Each norm layer needs its mean, then its variance; layers that do not wait for
    # each other may share a message.
    assert sum(one.elements for one in found) == count(setup.state_like().batch_stats)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_exchanges_gradients_statistics_and_metrics_and_nothing_else(
    microbatches,
):
    changes = {"batch_size": 32, "optim.microbatches": microbatches}
    setup = tiny.setup(ONE_BLOCK | changes | {"model.bn_group_size": 2})
    state = setup.state_like()
    found = collectives(setup.compile_train_step())
    # Microbatches are dealt such that no image changes its device.
    assert {(one.kind, one.devices) for one in found} == {("all-reduce", 8)}
    # The two metrics are loss and top-1. A loop over microbatches has them once.
    expected = count(state.params) + count(state.batch_stats) + 2
    assert sum(one.elements for one in found) == expected


# Rows of a batch.


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_batches_come_back_from_the_devices_as_they_went(devices):
    mesh = tiny.mesh_of(devices)
    batch = {
        "image": np.arange(16 * 3 * 3).reshape(16, 3, 3, 1).astype(np.uint8),
        "label": np.arange(16, dtype=np.int32)[::-1].copy(),
        "mask": np.arange(16) % 3 == 0,
    }
    placed = sharding.to_devices(batch, mesh, 16)
    for key, rows in batch.items():
        assert placed[key].sharding == sharding.batch_sharding(mesh)
        assert placed[key].dtype == rows.dtype
        share = placed[key].addressable_shards[0].data
        np.testing.assert_array_equal(share, rows[: 16 // devices])
        np.testing.assert_array_equal(sharding.local_values(placed[key]), rows)


def test_local_values_are_in_the_order_of_rows_whatever_that_of_devices():
    devices = np.array(jax.devices()[:8])[[3, 1, 0, 2, 7, 6, 5, 4]]
    mesh = jax.sharding.Mesh(devices, ("data",))
    rows = np.arange(16)
    placed = sharding.to_devices({"rows": rows}, mesh, 16)["rows"]
    np.testing.assert_array_equal(sharding.local_values(placed), rows)
    assert sharding.local_rows(mesh, 16) == rows.tolist()


@pytest.mark.parametrize("devices", [1, 8])
def test_one_process_holds_all_rows(devices):
    assert sharding.local_rows(tiny.mesh_of(devices), 24) == list(range(24))


def test_the_mesh_is_all_devices_along_one_axis():
    mesh = sharding.make_mesh()
    assert (mesh.shape, mesh.devices.tolist()) == ({"data": 8}, jax.devices())


def test_replicated_arrays_are_whole_everywhere():
    placed = jax.device_put(np.arange(6), sharding.replicated(tiny.mesh_of(8)))
    assert [shard.data.shape for shard in placed.addressable_shards] == [(6,)] * 8


@pytest.mark.parametrize("numbers", [set(), {0}, {5, 3, 12}])
def test_the_union_over_one_process_is_its_own_set(numbers):
    assert sharding.union(set(numbers)) == numbers


# Batch sizes.


@pytest.mark.parametrize("batch_size", [8, 16, 4096])
def test_a_batch_size_that_the_devices_divide_is_legal(batch_size):
    sharding.check_batch_size("batch_size", batch_size, tiny.mesh_of(8))


@pytest.mark.parametrize(
    ("batch_size", "nearest"),
    [
        (-8, "8"),
        (-1, "8"),
        (0, "8"),
        (7, "8"),
        (9, "8 or 16"),
        (100, "96 or 104"),
        (4095, "4088 or 4096"),
    ],
)
def test_an_illegal_batch_size_is_answered_with_the_nearest_legal_ones(
    batch_size, nearest
):
    match = rf"evaluate\.batch_size={batch_size} .*8 devices.*: {nearest}\."
    with pytest.raises(UserError, match=match):
        sharding.check_batch_size("evaluate.batch_size", batch_size, tiny.mesh_of(8))
