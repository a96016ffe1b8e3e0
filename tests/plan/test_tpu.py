"""`python -m resnet_jax.plan` with the compiler for TPUs, and no TPU."""

import importlib.util

import jax
import pytest

from resnet_jax.compiler.chips import CHIPS, slices_of
from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.models.cost import cost_of_image
from resnet_jax.parallel import sharding
from resnet_jax.plan import compile_steps, compile_stock_linen
from resnet_jax.plan import compile_subprocess as ask_module
from resnet_jax.plan.compile_subprocess import ask
from resnet_jax.plan.estimate import predict
from tests.helpers import tiny

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"),
    reason="needs libtpu: pip install libtpu",
)


def test_chips_cores_and_hosts_are_those_of_the_slice(monkeypatch):
    for name, value in ask_module.FOR_TPU.items():
        monkeypatch.setenv(name, value)
    for topology, devices, chips, hosts in (
        ("v5e:1x1", 1, 1, 1),
        # Sold with one host; larger ones have four chips a host.
        ("v5e:2x4", 8, 8, 1),
        ("v6e:4x4", 16, 16, 4),
        # The two cores of a chip are one device, but not in v3 and tpu7x.
        ("v4:2x2x1", 4, 4, 1),
        ("v5p:2x2x2", 8, 8, 2),
        ("v3:4x4", 32, 16, 4),
        ("tpu7x:2x2x1", 8, 4, 1),
        # Chips of different slices have the same coordinates.
        ("2*v5e:2x4", 16, 16, 2),
        ("3*v6e:4x4", 48, 48, 12),
        ("2*v5p:2x2x1", 8, 8, 2),
        ("2*v4:2x2x1", 8, 8, 2),
        ("2*v3:2x2", 16, 8, 2),
        ("2*tpu7x:2x2x1", 16, 8, 2),
    ):
        where = compile_steps.where_of(topology, compile_steps.devices_of(topology))
        found = where["devices"], where["chips"], where["hosts"]
        assert (topology, *found) == (topology, devices, chips, hosts)
        chip = CHIPS[topology.rpartition("*")[2].partition(":")[0]]
        assert where["slices"] == slices_of(topology)
        assert where["memory"] * devices == chip.hbm * chips
        assert where["kind"] == chip.kind


@pytest.mark.parametrize("slice_", ["v5e:2x4", "v6e:4x4", "v4:2x2x2", "v3:4x4"])
def test_the_mesh_of_slices_is_that_of_each_with_processes_together(
    slice_, monkeypatch
):
    for name, value in ask_module.FOR_TPU.items():
        monkeypatch.setenv(name, value)
    alone = compile_steps.devices_of(slice_)
    mesh = sharding.make_mesh(alone)
    expected = jax.make_mesh((len(alone),), ("data",), devices=alone)
    assert mesh.devices.tolist() == expected.devices.tolist()
    several = compile_steps.devices_of(f"3*{slice_}")
    found = sharding.make_mesh(several[::-1]).devices.tolist()
    assert set(found) == set(several)
    processes = [one.process_index for one in found]
    assert processes == sorted(processes)
    assert [one.slice_index for one in found] == sorted(
        one.slice_index for one in several
    )
    # Within a process, devices are in the order of a slice alone.
    place = {(*one.coords, one.core_on_chip): i for i, one in enumerate(mesh.devices)}
    for index in set(processes):
        own = [one for one in found if one.process_index == index]
        places = [place[(*one.coords, one.core_on_chip)] for one in own]
        assert places == sorted(places)


def test_a_small_run_is_planned_for_slices_that_are_not_there(cache):
    # Groups of eight images are on two devices, and in one slice.
    config = tiny.config({"model.bn_group_size": 8})
    found = ask(config, "2*v5e:2x4", per_chip=4)
    assert (found["devices"], found["chips"], found["hosts"]) == (16, 16, 2)
    assert (found["slices"], found["batch_size"]) == (2, 64)
    collectives = found["train"]["collectives"]
    between = [one for one in collectives if one["slices"]]
    assert {(one["kind"], one["slices"]) for one in between} == {("all-reduce", 2)}
    # Each device sends its eighth of the float32 gradients, in rows of 128 numbers, of
    # which kernels with eight channels fill a sixteenth.
    sent = sum(one["times"] * one["bytes"] for one in between)
    assert 4 * found["params"] / 8 < sent < 16 * 4 * found["params"] / 8
    # Statistics of ghost batches stay in pairs of devices of one slice.
    inside = [one for one in collectives if not one["slices"]]
    assert 2 in {one["devices"] for one in inside}
    assert max(one["devices"] for one in inside) == 8
    predicted = predict(found)
    assert predicted["outside_bytes"] == sent
    assert 0 < predicted["seconds"]["outside"] < predicted["seconds"]["network"]


def test_parameters_in_parts_are_planned_over_slices(cache):
    found = ask(tiny.config(tiny.IN_PARTS), "2*v5e:2x2", per_chip=4)
    kinds = {
        (one["kind"], one["devices"])
        for one in found["train"]["collectives"]
        if one["slices"]
    }
    assert kinds == {("all-gather", 2), ("all-reduce", 2)}
    assert ("reduce-scatter", 4) in {
        (one["kind"], one["devices"]) for one in found["train"]["collectives"]
    }


@pytest.mark.parametrize("size", [4, 16])
def test_ghost_batches_that_are_legal_on_slices_compile(cache, size):
    config = tiny.config({"model.bn_group_size": size})
    found = ask(config, "3*v5e:2x2", per_chip=4, evaluation=False)
    assert found["slices"] == 3 and "memory" in found["train"]


def test_ghost_batches_over_parts_of_slices_are_refused_before_compiling(cache):
    config = tiny.config({"model.bn_group_size": 24})
    with pytest.raises(UserError, match=r"bn_group_size=24 .* the nearest .* 16 or 48"):
        ask(config, "3*v5e:2x2", per_chip=4)


def test_a_small_run_is_planned_for_tpus_that_are_not_there(cache):
    found = ask(tiny.config(), "v5e:2x2", per_chip=4)
    assert (found["devices"], found["chips"], found["hosts"]) == (4, 4, 1)
    assert (found["chip"], found["batch_size"]) == ("v5e", 16)
    predicted = predict(found, price=1.0)
    assert predicted["fits"]
    assert found["train"]["cycles"] > found["eval"]["cycles"] > 0
    assert 0 < predicted["utilization"] < 1
    # Gradients may be reduced in bfloat16, but none is left out.
    reduced = sum(one["bytes"] for one in found["train"]["collectives"])
    assert reduced >= 2 * found["params"]
    assert 0 < predicted["efficiency"][256] < predicted["efficiency"][4] < 1


@pytest.mark.slow
def test_the_stock_step_is_compiled_for_one_device(monkeypatch):
    for name, value in ask_module.FOR_TPU.items():
        monkeypatch.setenv(name, value)
    found = compile_stock_linen.figures("v4", model="resnet26", image_size=32, images=8)
    assert (found.images, found.devices) == (8, 1)
    # Three passes of two operations a MAC; padding may count for more.
    macs = cost_of_image(create_model("resnet26"), 32).macs
    assert 0.9 < found.flops / (3 * 2 * macs * 8) < 1.5
    assert found.cycles > 0 and found.hbm_bytes > 0


def test_an_option_that_the_compiler_does_not_know_is_told(cache):
    changes = {"compiler_options": {"xla_tpu_no_such_option": 1}}
    with pytest.raises(UserError, match=r"compiler_options=.*xla_tpu_no_such_option"):
        ask(tiny.config(changes), "v5e:2x2", evaluation=False)


def test_a_slice_that_nobody_sells_is_told(cache):
    with pytest.raises(
        UserError, match=r"libtpu does not know the topology v5e:3x5 \(.*docs/v5e"
    ):
        ask(tiny.config(), "v5e:3x5")


def test_out_of_memory_is_told_with_its_amount(cache):
    # A megapixel of 2048 channels in float32 takes half of the memory, and there are
    # more than two of them.
    changes = {"data.image_size": 1024, "model.overrides.stem": ((3, 1, 2048),)}
    found = ask(tiny.config(changes), "v5e:2x2", per_chip=4, evaluation=False)
    predicted = predict(found)
    assert not predicted["fits"]
    assert predicted["memory"] > predicted["limit"] > 15 * 2**30
