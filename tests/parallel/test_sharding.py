"""What lies where; the number of devices changes neither result nor group."""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models.cost import count
from resnet_jax.parallel import sharding
from resnet_jax.plan import hlo
from resnet_jax.plan.hlo import Collective
from resnet_jax.training import programs
from resnet_jax.training.experiment import Experiment
from resnet_jax.training.step import TrainState
from resnet_jax.training.summary import summary
from tests.helpers import tiny

# One block: the stem's norm and two more.
ONE_BLOCK = {"model.overrides.stage_sizes": (1,), "model.overrides.widths": (8,)}


@functools.cache
def two_steps(group: int | str, devices: int) -> dict:
    """State and metrics after two steps of 16 images, from a fixed state."""
    setup = tiny.setup(ONE_BLOCK | {"model.bn_group_size": group}, devices)
    return steps(setup, tiny.state(setup), 2)[0]


def steps(setup: Experiment, state: TrainState, number: int) -> tuple[dict, TrainState]:
    """State and metrics after some steps, on the host, and the state as it lies."""
    train_step = programs.compile_train_step(setup)
    for seed in range(number):
        batch = setup.to_devices(tiny.batch(setup, seed))
        state, metrics = train_step(state, batch)
    return jax.device_get({**vars(state), **metrics}), state


# Of 16 images, 8 devices hold two each: groups of one inside a device, of two as a
# device holds them, of four over two devices, and one over all.
@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
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


def compile_forward(setup: Experiment):
    """Logits in training mode, and nothing else, so only norms need other devices."""

    def forward(variables, image):
        logits, _ = setup.model.apply(
            variables, image, train=True, mutable=["batch_stats"]
        )
        return logits

    like = programs.train_batch_like(setup)["image"]
    image = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.sharding)
    jitted = jax.jit(forward, out_shardings=sharding.batch_sharding(setup.mesh))
    return jitted.lower(programs.state_like(setup).evaluated(), image).compile()


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
    assert sum(one.elements for one in found) == count(
        programs.state_like(setup).batch_stats
    )


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_exchanges_gradients_statistics_and_metrics_and_nothing_else(
    microbatches,
):
    changes = {"batch_size": 32, "optim.microbatches": microbatches}
    setup = tiny.setup(ONE_BLOCK | changes | {"model.bn_group_size": 2})
    state = programs.state_like(setup)
    found = collectives(programs.compile_train_step(setup))
    # Microbatches are dealt such that no image changes its device.
    assert {(one.kind, one.devices) for one in found} == {("all-reduce", 8)}
    # The two metrics are loss and top-1. A loop over microbatches has them once.
    expected = count(state.params) + count(state.batch_stats) + 2
    assert sum(one.elements for one in found) == expected


# Parameters in parts.


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((3, 3, 64, 128), (3, 3, 64, 16)),
        # The first of equal ones.
        ((3, 3, 64, 64), (3, 3, 8, 64)),
        # 1000 is longer than 512, and 8 divides it; 1001 is not divided.
        ((512, 1000), (512, 125)),
        ((512, 1001), (64, 1001)),
        ((127, 1001), (127, 1001)),
        # 2^14 numbers, and one less of each pair.
        ((2**14,), (2**11,)),
        ((2**13,), (2**13,)),
        ((), ()),
    ],
)
def test_the_longest_axis_that_devices_divide_is_cut(shape, parts):
    assert sharding.fully_sharded(tiny.mesh_of(8), shape).shard_shape(shape) == parts


def held(tree) -> int:
    """Numbers of a tree that the first device holds."""
    first = jax.devices()[0]
    return sum(
        shard.data.size
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


# Sums over images and devices, norms of a gradient and of each parameter, a second
# gradient, and blocks that are stacked.
UPDATES = {
    "sgd": {"optim.microbatches": 2, "optim.clip_norm": 1.0},
    "lars": {"optim.name": "lars", "optim.sam_rho": 0.05},
    "lamb": {"optim.name": "lamb", "optim.learning_rate": 0.01},
    "agc": {
        "optim.agc": 0.01,
        "model.scan_blocks": True,
        "model.overrides.stage_sizes": (2,),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("which", UPDATES)
def test_parameters_in_parts_are_trained_as_whole_ones_are(which):
    changes = ONE_BLOCK | tiny.IN_PARTS | {"model.overrides.widths": (64,)}
    in_parts = tiny.setup(changes | {"ema_decay": 0.9} | UPDATES[which])
    whole = tiny.setup(
        changes | {"ema_decay": 0.9, "sharding.params": "replicated"} | UPDATES[which]
    )
    first = jax.device_get(programs.init_state(whole))
    ours, state = steps(
        in_parts, jax.device_put(first, programs.state_shardings(in_parts)), 2
    )
    theirs, _ = steps(whole, jax.device_put(first, programs.state_shardings(whole)), 2)
    # As above, but sums of 16 x 64 x 64 terms: sqrt(64) times as long a way.
    assert tiny.difference(ours, theirs) < 1e-4
    # A step leaves everything where it was: of each kernel of 64 x 64 an eighth.
    sizes = [leaf.size for leaf in jax.tree.leaves(state.params)]
    kernels = sum(size for size in sizes if size >= 9 * 64 * 64)
    mine = kernels // 8 + sum(sizes) - kernels
    assert held(state.params) == held(state.ema["params"]) == mine < sum(sizes) / 6
    moments = 2 if which == "lamb" else 1
    # And how many steps there were, once or twice.
    assert 0 < held(state.opt_state) - moments * mine <= 2
    assert held(state.batch_stats) == count(state.batch_stats)


def test_parameters_in_parts_are_drawn_and_placed_as_whole_ones_are():
    in_parts = tiny.setup(tiny.IN_PARTS)
    whole = tiny.setup(tiny.IN_PARTS | {"sharding.params": "replicated"})
    drawn = programs.init_state(in_parts)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(jax.device_get(drawn), jax.device_get(programs.init_state(whole)))
    variables = jax.device_get(drawn.evaluated())
    started = programs.state_from(in_parts, variables)
    same(jax.device_get(started.evaluated()), variables)
    assert held(started.params) == held(drawn.params) < count(drawn.params) / 6


def test_of_parts_only_kernels_and_gradients_cross_the_network():
    setup = tiny.setup(ONE_BLOCK | tiny.IN_PARTS | {"model.overrides.widths": (64,)})
    state = programs.state_like(setup)
    cut = [x for x in jax.tree.leaves(state.params) if x.size >= sharding.SMALL]
    found = collectives(programs.compile_train_step(setup))
    assert {one.devices for one in found} == {8}
    elements = {
        kind: sum(one.elements for one in found if one.kind == kind)
        for kind in {one.kind for one in found}
    }
    # XLA for CPUs has no reduce-scatter of its own. Behind gradients, statistics and
    # two metrics come the parts' sums of squares, for `grad_norm`.
    reduced = count(state.params) + count(state.batch_stats) + 2 + len(cut)
    assert elements == {"all-gather": count(cut), "all-reduce": reduced}


def test_parameters_in_parts_are_evaluated_as_whole_ones_are():
    in_parts = tiny.setup(tiny.IN_PARTS)
    whole = tiny.setup(tiny.IN_PARTS | {"sharding.params": "replicated"})
    batch = tiny.batch(whole) | {"mask": np.ones(16, bool)}
    sums = []
    for setup in (in_parts, whole):
        allowed = jax.device_put(np.ones(10, bool), sharding.replicated(setup.mesh))
        variables = tiny.state(setup).evaluated()
        placed = setup.eval_to_devices(batch)
        sums.append(programs.compile_eval_step(setup)(variables, placed, allowed)[0])
    # The same sums of whole kernels on each device.
    assert tiny.difference(*map(jax.device_get, sums)) < 1e-6


def test_a_way_to_lie_that_there_is_not_is_answered_with_the_nearest():
    match = r"There is no sharding\.params='fdsp'\. Did you mean fsdp\?"
    with pytest.raises(UserError, match=match):
        tiny.setup({"sharding.params": "fdsp"})


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


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A device as JAX describes it, as far as a mesh asks."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def gpus(slices: list[int], of_each: int) -> list[Accelerator]:
    """GPUs of processes with `of_each` of them; the process i is in slice slices[i]."""
    return [
        Accelerator(process * of_each + i, process, slice_)
        for process, slice_ in enumerate(slices)
        for i in range(of_each)
    ]


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(gpus([0, 1, 2, 3], 8), id="a process a node"),
        pytest.param(gpus([0] * 4 + [1] * 4, 1), id="a process a GPU"),
        # As Slurm's --distribution=cyclic places them.
        pytest.param(gpus([0, 1, 0, 1, 0, 1], 1), id="processes dealt to nodes"),
        pytest.param(gpus([3, 3, 1, 1], 4), id="two nodes a slice, the last one first"),
        pytest.param(gpus([0, 0, 0, 1], 4), id="one slice is smaller"),
    ],
)
def test_a_mesh_of_several_slices_has_one_slice_and_process_after_the_other(devices):
    # JAX does not promise the order in which it lists devices.
    shuffled = random.Random(0).sample(devices, len(devices))
    mesh = sharding.make_mesh(shuffled)
    found = mesh.devices.tolist()
    assert found == sorted(
        devices, key=lambda one: (one.slice_index, one.process_index, one.id)
    )
    assert sharding.slice_count(mesh) == len({one.slice_index for one in devices})
    # Each image lies where it would on one slice: the i-th rows are the i-th device's.
    of_device = sharding.batch_sharding(mesh).devices_indices_map((3 * len(devices),))
    assert [of_device[one] for one in found] == [
        (slice(3 * i, 3 * i + 3),) for i in range(len(devices))
    ]


@pytest.mark.parametrize("slice_index", [0, 5, None])
def test_devices_of_one_slice_are_ordered_as_jax_does(slice_index):
    devices = [Accelerator(i, i // 4, slice_index) for i in (3, 0, 7, 1, 2, 6, 5, 4)]
    expected = jax.make_mesh((8,), ("data",), devices=devices)
    mesh = sharding.make_mesh(devices)
    assert mesh.devices.tolist() == expected.devices.tolist()
    assert sharding.slice_count(mesh) == 1


@pytest.mark.parametrize(
    ("slices", "told"),
    [([0, 1], "8 x NVIDIA H100 80GB HBM3 (gpu), 2 slices,"), ([0, 0], "(gpu), 1 pro")],
)
def test_a_run_tells_of_its_slices(slices, told, tmp_path):
    mesh = sharding.make_mesh(gpus(slices, 4))
    text = summary(dataclasses.replace(tiny.setup(), mesh=mesh), tmp_path)
    assert told in text.splitlines()[0]


def test_tpu_slices_of_different_sizes_are_refused():
    devices = [
        dataclasses.replace(one, platform="tpu", device_kind="TPU v5 lite")
        for one in gpus([0, 0, 1], 4)
    ]
    with pytest.raises(UserError, match="slice 0 has 8, slice 1 has 4"):
        sharding.make_mesh(devices)


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
    match = rf"evaluate\.batch_size={batch_size} .*8 devices.* with {nearest}\."
    with pytest.raises(UserError, match=match):
        sharding.check_batch_size("evaluate.batch_size", batch_size, tiny.mesh_of(8))
