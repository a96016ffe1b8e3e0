"""Shardings; results do not depend on the number of devices."""

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
from resnet_jax.training import programs
from resnet_jax.training.experiment import Experiment
from resnet_jax.training.step import TrainState
from resnet_jax.training.summary import summary
from tests.helpers import tiny

# A network of one block, which has the norm of the stem and two more.
ONE_BLOCK = {"model.overrides.stage_sizes": (1,), "model.overrides.widths": (8,)}


@functools.cache
def two_steps(group_size: int | str, devices: int) -> dict:
    """Returns state and metrics after two steps of 16 images, from a fixed state."""
    setup = tiny.setup(ONE_BLOCK | {"model.bn_group_size": group_size}, devices)
    return steps(setup, tiny.state(setup), 2)[0]


def steps(setup: Experiment, state: TrainState, number: int) -> tuple[dict, TrainState]:
    """Runs some steps.

    Returns:
      State and metrics by name on the host, and the state on the devices.
    """
    train_step = programs.compile_train_step(setup)
    for seed in range(number):
        batch = setup.to_devices(tiny.batch(setup, seed))
        state, metrics = train_step(state, batch)
    return jax.device_get({**vars(state), **metrics}), state


# Each of 8 devices holds two of 16 images. So it holds two ghost batches of size 1 or
# one of size 2. A ghost batch of size 4 spans two devices, and a global one spans all.
@pytest.mark.slow
@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("group_size", [1, 2, 4, "global"])
def test_a_step_has_the_same_result_on_any_number_of_devices(group_size, devices):
    single, several = two_steps(group_size, 1), two_steps(group_size, devices)
    # The float32 sums are the same but for their order. The longest have 16 x 64 terms,
    # hence errors of sqrt(1024) x 2^-24 = 2e-6, through six layers and back.
    assert tiny.difference(several, single) < 2e-5


def test_the_size_of_ghost_batches_changes_the_step():
    # The difference is larger than the bound above, which could not fail otherwise.
    for size, larger in ((1, 2), (2, 4), (4, "global")):
        assert tiny.difference(two_steps(size, 1), two_steps(larger, 1)) > 1e-2


# Communication between devices, in the compiled programs.


def collectives_of_forward(setup: Experiment) -> list[hlo.Collective]:
    """Returns the collectives of a forward pass in training mode.

    It computes nothing but logits, so only norms need other devices.
    """

    def forward(variables, image):
        logits, _ = setup.model.apply(
            variables, image, train=True, mutable=["batch_stats"]
        )
        return logits

    like = programs.train_batch_like(setup)["image"]
    image = jax.ShapeDtypeStruct(like.shape, jnp.float32, sharding=like.sharding)
    jitted = jax.jit(forward, out_shardings=sharding.batch_sharding(setup.mesh))
    compiled = jitted.lower(programs.state_like(setup).evaluated(), image).compile()
    return hlo.collectives(compiled.as_text())


@pytest.mark.parametrize("group_size", [1, 2, "device"])
def test_ghost_batches_inside_a_device_need_no_communication(group_size):
    setup = tiny.setup({"model.bn_group_size": group_size})
    assert collectives_of_forward(setup) == []


@pytest.mark.parametrize(("group_size", "devices"), [(4, 2), (8, 4), ("global", 8)])
def test_devices_communicate_only_with_those_of_the_same_ghost_batch(
    group_size, devices
):
    setup = tiny.setup({"model.bn_group_size": group_size})
    collectives = collectives_of_forward(setup)
    assert {(x.kind, x.devices) for x in collectives} == {("all-reduce", devices)}
    # Each norm layer needs its mean, then its variance. Layers that do not depend on
    # each other may share a message.
    elements = sum(x.elements for x in collectives)
    assert elements == count(programs.state_like(setup).batch_stats)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_communicates_only_gradients_statistics_and_metrics(
    microbatches,
):
    changes = {"batch_size": 32, "optim.microbatches": microbatches}
    setup = tiny.setup(ONE_BLOCK | changes | {"model.bn_group_size": 2})
    state = programs.state_like(setup)
    collectives = hlo.collectives(programs.compile_train_step(setup).as_text())
    # Images are assigned to microbatches such that none changes its device.
    assert {(x.kind, x.devices) for x in collectives} == {("all-reduce", 8)}
    # The two metrics are loss and top-1. They are communicated once, after a loop over
    # microbatches.
    expected = count(state.params) + count(state.batch_stats) + 2
    assert sum(x.elements for x in collectives) == expected


# Sharded parameters.


@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((3, 3, 64, 128), (3, 3, 64, 16)),
        # The first of equally long axes is split.
        ((3, 3, 64, 64), (3, 3, 8, 64)),
        # 8 divides 1000, which is longer than 512, but not 1001.
        ((512, 1000), (512, 125)),
        ((512, 1001), (64, 1001)),
        ((127, 1001), (127, 1001)),
        # Arrays of 2^14 elements are split, and smaller ones are not.
        ((2**14,), (2**11,)),
        ((2**13,), (2**13,)),
        ((), ()),
    ],
)
def test_the_longest_axis_that_the_number_of_devices_divides_is_split(shape, parts):
    assert sharding.fully_sharded(tiny.mesh_of(8), shape).shard_shape(shape) == parts


def elements_held(tree) -> int:
    """Returns the number of elements of a tree that the first device holds."""
    first = jax.devices()[0]
    return sum(
        shard.data.size
        for leaf in jax.tree.leaves(tree)
        for shard in leaf.addressable_shards
        if shard.device == first
    )


# Updates with sums over images and devices, norms of the gradient and of each
# parameter, a second gradient, and stacked blocks.
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
@pytest.mark.parametrize("update", UPDATES)
def test_sharded_parameters_are_trained_like_replicated_ones(update):
    changes = ONE_BLOCK | tiny.IN_PARTS | {"model.overrides.widths": (64,)}
    sharded = tiny.setup(changes | {"ema_decay": 0.9} | UPDATES[update])
    replicated = tiny.setup(
        changes | {"ema_decay": 0.9, "sharding.params": "replicated"} | UPDATES[update]
    )
    first = jax.device_get(programs.init_state(replicated))
    result, state = steps(
        sharded, jax.device_put(first, programs.state_shardings(sharded)), 2
    )
    expected, _ = steps(
        replicated, jax.device_put(first, programs.state_shardings(replicated)), 2
    )
    # As above, but the sums have 16 x 64 x 64 terms, so errors are 8 times as large.
    assert tiny.difference(result, expected) < 1e-4
    # A step keeps the shardings: each device holds an eighth of each 64 x 64 kernel.
    sizes = [leaf.size for leaf in jax.tree.leaves(state.params)]
    kernels = sum(size for size in sizes if size >= 9 * 64 * 64)
    share = kernels // 8 + sum(sizes) - kernels
    assert (
        elements_held(state.params)
        == elements_held(state.ema["params"])
        == share
        < sum(sizes) / 6
    )
    moments = 2 if update == "lamb" else 1
    # The rest are one or two counters of steps.
    assert 0 < elements_held(state.opt_state) - moments * share <= 2
    assert elements_held(state.batch_stats) == count(state.batch_stats)


def test_sharded_parameters_are_initialized_and_placed_like_replicated_ones():
    sharded = tiny.setup(tiny.IN_PARTS)
    replicated = tiny.setup(tiny.IN_PARTS | {"sharding.params": "replicated"})
    state = programs.init_state(sharded)
    assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    assert_equal(jax.device_get(state), jax.device_get(programs.init_state(replicated)))
    variables = jax.device_get(state.evaluated())
    started = programs.state_from(sharded, variables)
    assert_equal(jax.device_get(started.evaluated()), variables)
    assert (
        elements_held(started.params)
        == elements_held(state.params)
        < count(state.params) / 6
    )


def test_sharding_communicates_only_kernels_and_gradients():
    setup = tiny.setup(ONE_BLOCK | tiny.IN_PARTS | {"model.overrides.widths": (64,)})
    state = programs.state_like(setup)
    split = [x for x in jax.tree.leaves(state.params) if x.size >= sharding.SMALL]
    collectives = hlo.collectives(programs.compile_train_step(setup).as_text())
    assert {x.devices for x in collectives} == {8}
    elements = {
        kind: sum(x.elements for x in collectives if x.kind == kind)
        for kind in {x.kind for x in collectives}
    }
    # XLA for CPUs has no reduce-scatter of its own. Besides gradients, statistics and
    # two metrics, the sums of squares of the sharded gradients are reduced, for
    # `grad_norm`.
    reduced = count(state.params) + count(state.batch_stats) + 2 + len(split)
    assert elements == {"all-gather": count(split), "all-reduce": reduced}


def test_sharded_parameters_are_evaluated_like_replicated_ones():
    sharded = tiny.setup(tiny.IN_PARTS)
    replicated = tiny.setup(tiny.IN_PARTS | {"sharding.params": "replicated"})
    batch = tiny.batch(replicated) | {"mask": np.ones(16, bool)}
    sums = []
    for setup in (sharded, replicated):
        allowed = jax.device_put(np.ones(10, bool), sharding.replicated(setup.mesh))
        variables = tiny.state(setup).evaluated()
        placed = setup.eval_to_devices(batch)
        sums.append(programs.compile_eval_step(setup)(variables, placed, allowed)[0])
    # Each device computes the same sums with all-gathered kernels.
    assert tiny.difference(*map(jax.device_get, sums)) < 1e-6


def test_an_unknown_sharding_is_reported_with_the_nearest_known_one():
    match = r"There is no sharding\.params='fdsp'\. Did you mean fsdp\?"
    with pytest.raises(UserError, match=match):
        tiny.setup({"sharding.params": "fdsp"})


# Rows of a batch.


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_the_rows_of_a_batch_are_the_same_on_the_devices(devices):
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


def test_local_values_are_in_the_order_of_rows_for_any_order_of_devices():
    devices = np.array(jax.devices()[:8])[[3, 1, 0, 2, 7, 6, 5, 4]]
    mesh = jax.sharding.Mesh(devices, ("data",))
    rows = np.arange(16)
    placed = sharding.to_devices({"rows": rows}, mesh, 16)["rows"]
    np.testing.assert_array_equal(sharding.local_values(placed), rows)
    assert sharding.local_rows(mesh, 16) == rows.tolist()


@pytest.mark.parametrize("devices", [1, 8])
def test_a_single_process_holds_all_rows(devices):
    assert sharding.local_rows(tiny.mesh_of(devices), 24) == list(range(24))


def test_the_mesh_has_all_devices_along_one_axis():
    mesh = sharding.make_mesh()
    assert (mesh.shape, mesh.devices.tolist()) == ({"data": 8}, jax.devices())


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """The attributes of a device that a mesh needs."""

    id: int
    process_index: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def gpus(slices: list[int], per_process: int) -> list[Accelerator]:
    """Returns the GPUs of several processes; the process i is in slice slices[i]."""
    return [
        Accelerator(process * per_process + i, process, slice_)
        for process, slice_ in enumerate(slices)
        for i in range(per_process)
    ]


@pytest.mark.parametrize(
    "devices",
    [
        pytest.param(gpus([0, 1, 2, 3], 8), id="one process per node"),
        pytest.param(gpus([0] * 4 + [1] * 4, 1), id="one process per GPU"),
        # Slurm's --distribution=cyclic places processes like this.
        pytest.param(gpus([0, 1, 0, 1, 0, 1], 1), id="processes placed cyclically"),
        pytest.param(
            gpus([3, 3, 1, 1], 4), id="two nodes per slice, in descending order"
        ),
        pytest.param(gpus([0, 0, 0, 1], 4), id="one smaller slice"),
    ],
)
def test_a_mesh_of_several_slices_is_ordered_by_slice_and_process(devices):
    # JAX does not promise the order in which it lists devices.
    shuffled = random.Random(0).sample(devices, len(devices))
    mesh = sharding.make_mesh(shuffled)
    ordered = mesh.devices.tolist()
    assert ordered == sorted(
        devices, key=lambda x: (x.slice_index, x.process_index, x.id)
    )
    assert sharding.slice_count(mesh) == len({x.slice_index for x in devices})
    # The i-th rows are on the i-th device, as on a single slice.
    rows = sharding.batch_sharding(mesh).devices_indices_map((3 * len(devices),))
    assert [rows[device] for device in ordered] == [
        (slice(3 * i, 3 * i + 3),) for i in range(len(devices))
    ]


@pytest.mark.parametrize("slice_index", [0, 5, None])
def test_devices_of_one_slice_are_in_the_order_of_jax(slice_index):
    devices = [Accelerator(i, i // 4, slice_index) for i in (3, 0, 7, 1, 2, 6, 5, 4)]
    expected = jax.make_mesh((8,), ("data",), devices=devices)
    mesh = sharding.make_mesh(devices)
    assert mesh.devices.tolist() == expected.devices.tolist()
    assert sharding.slice_count(mesh) == 1


@pytest.mark.parametrize(
    ("slices", "expected"),
    [([0, 1], "8 x NVIDIA H100 80GB HBM3 (gpu), 2 slices,"), ([0, 0], "(gpu), 1 pro")],
)
def test_the_summary_of_a_run_names_its_slices(slices, expected, tmp_path):
    mesh = sharding.make_mesh(gpus(slices, 4))
    text = summary(dataclasses.replace(tiny.setup(), mesh=mesh), tmp_path)
    assert expected in text.splitlines()[0]


def test_tpu_slices_of_different_sizes_are_refused():
    devices = [
        dataclasses.replace(gpu, platform="tpu", device_kind="TPU v5 lite")
        for gpu in gpus([0, 0, 1], 4)
    ]
    with pytest.raises(UserError, match="slice 0 has 8, slice 1 has 4"):
        sharding.make_mesh(devices)


def test_replicated_arrays_are_complete_on_every_device():
    placed = jax.device_put(np.arange(6), sharding.replicated(tiny.mesh_of(8)))
    assert [shard.data.shape for shard in placed.addressable_shards] == [(6,)] * 8


@pytest.mark.parametrize("numbers", [set(), {0}, {5, 3, 12}])
def test_the_union_over_one_process_is_its_own_set(numbers):
    assert sharding.union(set(numbers)) == numbers


# Batch sizes.


@pytest.mark.parametrize("batch_size", [8, 16, 4096])
def test_a_batch_size_that_the_number_of_devices_divides_is_legal(batch_size):
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
def test_an_illegal_batch_size_is_reported_with_the_nearest_legal_ones(
    batch_size, nearest
):
    match = rf"evaluate\.batch_size={batch_size} .*8 devices.* with {nearest}\."
    with pytest.raises(UserError, match=match):
        sharding.check_batch_size("evaluate.batch_size", batch_size, tiny.mesh_of(8))
