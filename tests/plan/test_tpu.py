"""`python -m resnet_jax.plan` with the compiler for TPUs, and no TPU."""

import importlib.util

import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.models.cost import cost_of_image
from resnet_jax.plan import ask as ask_module
from resnet_jax.plan import compiled, stock
from resnet_jax.plan.ask import ask
from resnet_jax.plan.chips import CHIPS
from resnet_jax.plan.predict import predict
from tests import tiny

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"),
    reason="needs libtpu: pip install -r requirements-plan.txt",
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
    ):
        where = compiled.where_of(topology, compiled.devices_of(topology))
        found = where["devices"], where["chips"], where["hosts"]
        assert (topology, *found) == (topology, devices, chips, hosts)
        chip = CHIPS[topology.partition(":")[0]]
        assert where["memory"] * devices == chip.hbm * chips
        assert where["kind"] == chip.kind


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
    found = stock.figures("v4", model="resnet26", image_size=32, images=8)
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
        UserError, match=r"libtpu knows no topology v5e:3x5 \(.*docs/v5e"
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
