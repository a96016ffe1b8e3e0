"""Tests of `plan` with the compiler for TPUs, without a TPU."""

import importlib.util

import jax
import pytest

from resnet_jax.compiler.chips import CHIPS, slices_of
from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.models.cost import cost_of_image
from resnet_jax.parallel import sharding
from resnet_jax.plan import compile_steps, compile_subprocess, stock
from resnet_jax.plan.compile_subprocess import compile_config
from resnet_jax.plan.estimate import estimate
from tests.helpers import tiny

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"),
    reason="needs libtpu: pip install libtpu",
)


def test_a_topology_has_the_devices_chips_and_hosts_of_its_slice(monkeypatch):
    for name, value in compile_subprocess.FOR_TPU.items():
        monkeypatch.setenv(name, value)
    for topology, devices, chips, hosts in (
        ("v5e:1x1", 1, 1, 1),
        # This slice is sold with one host; larger ones have four chips per host.
        ("v5e:2x4", 8, 8, 1),
        ("v6e:4x4", 16, 16, 4),
        # The two cores of a chip are one device, except in v3 and tpu7x.
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
        facts = compile_steps.facts_of_topology(
            topology, compile_steps.devices_of(topology)
        )
        counts = facts["devices"], facts["chips"], facts["hosts"]
        assert (topology, *counts) == (topology, devices, chips, hosts)
        chip = CHIPS[topology.rpartition("*")[2].partition(":")[0]]
        assert facts["slices"] == slices_of(topology)
        assert facts["memory"] * devices == chip.hbm * chips
        assert facts["kind"] == chip.kind


@pytest.mark.parametrize("slice_", ["v5e:2x4", "v6e:4x4", "v4:2x2x2", "v3:4x4"])
def test_the_mesh_orders_devices_by_slice_and_process(slice_, monkeypatch):
    for name, value in compile_subprocess.FOR_TPU.items():
        monkeypatch.setenv(name, value)
    alone = compile_steps.devices_of(slice_)
    mesh = sharding.make_mesh(alone)
    expected = jax.make_mesh((len(alone),), ("data",), devices=alone)
    assert mesh.devices.tolist() == expected.devices.tolist()
    several = compile_steps.devices_of(f"3*{slice_}")
    ordered = sharding.make_mesh(several[::-1]).devices.tolist()
    assert set(ordered) == set(several)
    processes = [device.process_index for device in ordered]
    assert processes == sorted(processes)
    assert [device.slice_index for device in ordered] == sorted(
        device.slice_index for device in several
    )
    # Within a process, devices have the order that they have in a single slice.
    place = {(*x.coords, x.core_on_chip): i for i, x in enumerate(mesh.devices)}
    for index in set(processes):
        own = [device for device in ordered if device.process_index == index]
        places = [place[(*device.coords, device.core_on_chip)] for device in own]
        assert places == sorted(places)


def test_a_small_run_is_planned_for_two_slices(cache):
    # A ghost batch of eight images lies on two devices of one slice.
    config = tiny.config({"model.bn_group_size": 8})
    facts = compile_config(config, "2*v5e:2x4", per_chip=4)
    assert (facts["devices"], facts["chips"], facts["hosts"]) == (16, 16, 2)
    assert (facts["slices"], facts["batch_size"]) == (2, 64)
    collectives = facts["train"]["collectives"]
    between = [each for each in collectives if each["slices"]]
    assert {(each["kind"], each["slices"]) for each in between} == {("all-reduce", 2)}
    # Each device sends its eighth of the float32 gradients. The rows have 128 numbers,
    # of which kernels with eight channels fill a sixteenth.
    sent = sum(each["times"] * each["bytes"] for each in between)
    assert 4 * facts["params"] / 8 < sent < 16 * 4 * facts["params"] / 8
    # Statistics of ghost batches are summed over pairs of devices of one slice.
    inside = [each for each in collectives if not each["slices"]]
    assert 2 in {each["devices"] for each in inside}
    assert max(each["devices"] for each in inside) == 8
    predicted = estimate(facts)
    assert predicted["outside_bytes"] == sent
    assert 0 < predicted["seconds"]["outside"] < predicted["seconds"]["network"]


def test_sharded_parameters_are_planned_for_two_slices(cache):
    facts = compile_config(tiny.config(tiny.IN_PARTS), "2*v5e:2x2", per_chip=4)
    kinds = {
        (each["kind"], each["devices"])
        for each in facts["train"]["collectives"]
        if each["slices"]
    }
    assert kinds == {("all-gather", 2), ("all-reduce", 2)}
    assert ("reduce-scatter", 4) in {
        (each["kind"], each["devices"]) for each in facts["train"]["collectives"]
    }


@pytest.mark.parametrize("size", [4, 16])
def test_ghost_batches_that_are_legal_on_slices_compile(cache, size):
    config = tiny.config({"model.bn_group_size": size})
    facts = compile_config(config, "3*v5e:2x2", per_chip=4, evaluation=False)
    assert facts["slices"] == 3 and "memory" in facts["train"]


def test_ghost_batches_that_straddle_slices_are_refused_before_compiling(cache):
    config = tiny.config({"model.bn_group_size": 24})
    with pytest.raises(UserError, match=r"bn_group_size=24 .* the nearest .* 16 or 48"):
        compile_config(config, "3*v5e:2x2", per_chip=4)


def test_a_small_run_is_planned_for_one_slice(cache):
    facts = compile_config(tiny.config(), "v5e:2x2", per_chip=4)
    assert (facts["devices"], facts["chips"], facts["hosts"]) == (4, 4, 1)
    assert (facts["chip"], facts["batch_size"]) == ("v5e", 16)
    predicted = estimate(facts, price=1.0)
    assert predicted["fits"]
    assert facts["train"]["cycles"] > facts["eval"]["cycles"] > 0
    assert 0 < predicted["utilization"] < 1
    # All gradients are reduced, though maybe in bfloat16.
    reduced = sum(each["bytes"] for each in facts["train"]["collectives"])
    assert reduced >= 2 * facts["params"]
    assert 0 < predicted["efficiency"][256] < predicted["efficiency"][4] < 1


@pytest.mark.slow
def test_the_stock_step_is_compiled_for_one_device(monkeypatch):
    for name, value in compile_subprocess.FOR_TPU.items():
        monkeypatch.setenv(name, value)
    figures = stock.figures("v4", model="resnet26", image_size=32, images=8)
    assert (figures.images, figures.devices) == (8, 1)
    # There are three passes of two operations per MAC; padding may add operations.
    macs = cost_of_image(create_model("resnet26"), 32).macs
    assert 0.9 < figures.flops / (3 * 2 * macs * 8) < 1.5
    assert figures.cycles > 0 and figures.hbm_bytes > 0


def test_an_unknown_compiler_option_is_reported(cache):
    changes = {"compiler_options": {"xla_tpu_no_such_option": 1}}
    with pytest.raises(UserError, match=r"compiler_options=.*xla_tpu_no_such_option"):
        compile_config(tiny.config(changes), "v5e:2x2", evaluation=False)


def test_a_slice_that_does_not_exist_is_reported(cache):
    with pytest.raises(
        UserError, match=r"libtpu does not know the topology v5e:3x5 \(.*docs/v5e"
    ):
        compile_config(tiny.config(), "v5e:3x5")


def test_a_step_that_does_not_fit_reports_the_memory_that_it_needs(cache):
    # One activation of a megapixel and 2048 float32 channels takes half of the memory,
    # and the step needs more than two.
    changes = {"data.image_size": 1024, "model.overrides.stem": ((3, 1, 2048),)}
    facts = compile_config(
        tiny.config(changes), "v5e:2x2", per_chip=4, evaluation=False
    )
    predicted = estimate(facts)
    assert not predicted["fits"]
    assert predicted["memory"] > predicted["limit"] > 15 * 2**30
