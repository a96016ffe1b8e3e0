"""Tests of the arithmetic of predictions, against numbers worked out by hand."""

import math

import pytest

from resnet_jax.compiler.chips import CHIPS, HOP, chip_of
from resnet_jax.plan import calibration
from resnet_jax.plan.estimate import estimate
from resnet_jax.plan.time_model import (
    network_seconds,
    outside_bytes,
    outside_seconds,
    ring_seconds,
    seconds_of,
)
from tests.helpers.plans import GIB, V5E, facts, two_slices

V4 = CHIPS["v4"]


@pytest.mark.parametrize(
    ("name", "gigahertz"),
    # The clocks are also published: v3 940 MHz, v4 1050 MHz (Jouppi et al. 2023,
    # arXiv:2304.01433, table 4), v5p 1750 MHz.
    [("v3", 0.94), ("v4", 1.05), ("v5p", 1.75), ("v5e", 1.5), ("v6e", 1.75)],
)
def test_the_clock_is_derived_from_the_peak(name, gigahertz):
    # Published peaks have three digits.
    assert CHIPS[name].clock == pytest.approx(gigahertz * 1e9, rel=5e-3)


def test_seconds_of_a_step_follow_from_operations_bytes_and_cycles():
    step = {"flops": 1.97e12, "hbm_bytes": 8.19e9, "cycles": V5E.clock}
    assert seconds_of(step, V5E, 1) == pytest.approx(
        {"compute": 0.01, "memory": 0.01, "cycles": 1.0}
    )
    # Two devices share the peaks of a chip, but each has its own clock.
    assert seconds_of(step, V5E, 2) == pytest.approx(
        {"compute": 0.02, "memory": 0.02, "cycles": 1.0}
    )


def test_an_all_reduce_takes_twice_as_long_as_a_reduce_scatter():
    # On 4 x 4 chips, 15/16 of the bytes are sent, over two rings of four chips with two
    # hops each.
    size = 2_000_000_000
    once = 15 / 16 * size / 200e9 + 4 * HOP
    assert ring_seconds("reduce-scatter", size, 16, V5E) == pytest.approx(once)
    assert ring_seconds("all-reduce", size, 16, V5E) == pytest.approx(2 * once)
    # On a torus of 4 x 4 x 4 chips there are three rings with two hops each.
    sent = 63 / 64 * size / (1.1e15 / 4096)
    expected = 2 * (sent + 6 * HOP)
    assert ring_seconds("all-reduce", size, 64, V4) == pytest.approx(expected)


def test_one_chip_needs_no_network():
    assert ring_seconds("all-reduce", 10**9, 1, V5E) == 0


def test_pods_exchange_the_shard_of_each_chip_over_the_outer_network():
    size = 2_560_000_000
    inside = ring_seconds("all-reduce", size, 256, V5E)
    # With four pods, each chip sends three quarters of its 10 MB twice, at 3.125 GB/s.
    outside = 2 * 3 / 4 * 10e6 / 3.125e9
    both = ring_seconds("all-reduce", size, 1024, V5E)
    assert both == pytest.approx(inside + outside)
    # Without a published bandwidth, the time is infinite.
    assert ring_seconds("all-reduce", size, 8192, V4) == math.inf


def test_only_collectives_over_all_devices_depend_on_the_size_of_the_slice():
    def expected(chips: int) -> float:
        return pytest.approx(3 * ring_seconds("all-reduce", 10**6, chips, V5E))

    collective = {"kind": "all-reduce", "bytes": 10**6, "times": 3}
    groups = [collective | {"devices": 4}]
    every = [collective | {"devices": 8}]
    assert network_seconds(groups, 8, 8, 256, V5E) == expected(4)
    assert network_seconds(every, 8, 8, 8, V5E) == expected(8)
    assert network_seconds(every, 8, 8, 256, V5E) == expected(256)
    # If a chip has two devices, four devices are two chips.
    assert network_seconds(groups, 4, 8, 256, V5E) == expected(2)


def test_a_run_is_predicted_from_the_longest_estimate_of_its_step():
    predicted = estimate(facts(), input_rate=600.0, price=1.2)
    # The cycles take 100 ms. The network takes 0.9 ms, as 7/8 of 1e8 bytes are sent
    # twice at 200 GB/s, and the time of the hops.
    hops = 2 * 2 * (8**0.5) / 2 * HOP
    network = 2 * 7 / 8 * 1e8 / 200e9 + hops
    step = 0.1 + network
    assert predicted["seconds"] == pytest.approx(
        {"compute": 0.01, "memory": 0.05, "cycles": 0.1, "network": network}
    )
    assert predicted["bound"] == "memory"
    assert predicted["rate"] == pytest.approx(128 / step)
    # Without the cycles, the bytes decide, which take 50 ms.
    assert predicted["most"] == pytest.approx(128 / (0.05 + network))
    assert predicted["utilization"] == pytest.approx(1.97e12 / step / 197e12)
    assert predicted["efficiency"][1] == 1
    by_network = 2 * 255 / 256 * 1e8 / 200e9 + 2 * 2 * 8 * HOP
    assert predicted["efficiency"][256] == pytest.approx(0.1 / (0.1 + by_network))
    # 50,000 images are 49 batches of 1024. By their bytes, these take 50 ms each. There
    # are 36 evaluations.
    evaluation = 36 * 49 * 0.05 / 3600
    assert predicted["eval_hours"] == pytest.approx(evaluation)
    assert predicted["hours"] == pytest.approx(36_000 * step / 3600 + evaluation)
    assert predicted["cost"] == pytest.approx(predicted["hours"] * 8 * 1.2)
    # Each host prepares the images of half of the chips, 5.1e3 per second; a core
    # prepares 600.
    assert predicted["host_rate"] == pytest.approx(4 * 128 / step)
    assert predicted["cores"] == 9


@pytest.mark.parametrize(
    ("slower", "bound"),
    [
        ({"flops": 1.97e14}, "compute"),
        ({"hbm_bytes": 8.19e11}, "memory"),
        (
            {
                "collectives": [
                    {"kind": "all-reduce", "bytes": 10**11, "devices": 8, "times": 1}
                ]
            },
            "network",
        ),
    ],
)
def test_the_bound_is_the_resource_that_takes_longest(slower, bound):
    assert estimate(facts(train=facts()["train"] | slower))["bound"] == bound


def test_the_network_is_not_the_bound_if_computation_takes_longer():
    # The cycles take 0.1 s, the memory 0.05 s, and the network 0.09 s.
    size = round(0.09 / (2 * 7 / 8) * V5E.network)
    collectives = [{"kind": "all-reduce", "bytes": size, "devices": 8, "times": 1}]
    predicted = estimate(facts(train=facts()["train"] | {"collectives": collectives}))
    assert 0.05 < predicted["seconds"]["network"] < 0.1
    assert predicted["bound"] == "memory"


def test_an_unknown_efficiency_of_many_pods_is_none():
    predicted = estimate(facts(chip="v3"))
    assert predicted["efficiency"][4096] is None
    assert 0 < predicted["efficiency"][1024] < 1


def test_computation_is_calibrated_if_rates_are_published():
    by_cycles = facts()["train"] | {"cycles": V4.clock / 10}
    predicted = estimate(facts(chip="v4", train=by_cycles))
    factor = calibration.factor_of("v4")
    # The factor applies neither to the network nor beyond the peaks: 4.095e10 bytes at
    # 1200 GB/s.
    network = predicted["seconds"]["network"]
    assert 0.1 / factor > 4.095e10 / 1200e9
    assert predicted["factor"] == factor
    assert predicted["rate"] == pytest.approx(128 / (0.1 / factor + network))
    assert predicted["uncalibrated"] == pytest.approx(128 / (0.1 + network))
    for entry, (published, deviation) in zip(
        predicted["published"], calibration.deviations("v4"), strict=True
    ):
        assert (entry["rate"], entry["deviation"]) == (published.rate, deviation)
    hours = 36_000 * 128 / predicted["rate"] / 3600
    assert predicted["hours"] == pytest.approx(hours + predicted["eval_hours"])
    # No rates are published for v5e, nor for float32.
    for plan in (facts(), facts(chip="v4", train=by_cycles, dtype="float32")):
        predicted = estimate(plan)
        assert predicted["factor"] is None
        assert predicted["rate"] == predicted["uncalibrated"]


def test_no_calibration_goes_beyond_the_published_peaks():
    # The cycles take 35 ms, and the bytes 34.1 ms.
    train = facts()["train"] | {"cycles": 0.035 * V4.clock}
    predicted = estimate(facts(chip="v4", train=train))
    assert predicted["rate"] == predicted["most"] > predicted["uncalibrated"]


def test_no_speed_is_predicted_for_a_step_that_does_not_fit():
    train = {"wanted": 20 * GIB, "limit": 15 * GIB, "seconds": 1.0}
    assert estimate(facts(train=train)) == {
        "fits": False,
        "memory": 20 * GIB,
        "limit": 15 * GIB,
    }
    # Compilers for CPUs do not refuse a program that does not fit.
    predicted = estimate(facts(chip="", memory=7 * GIB))
    assert predicted == {"fits": False, "memory": 8 * GIB, "limit": 7 * GIB}


def test_bytes_between_slices_use_the_data_centre_network():
    # An all-reduce sends the shares of the other slices twice, other collectives once.
    assert outside_bytes("all-reduce", 1200, 2) == 1200
    assert outside_bytes("all-reduce", 1200, 4) == 1800
    assert outside_bytes("all-gather", 1200, 4) == 900
    assert outside_bytes("all-reduce", 1200, 1) == 0
    assert outside_seconds("all-reduce", 1200, 2, V5E) == 1200 / 3.125e9
    assert outside_seconds("all-reduce", 1200, 2, V4) == math.inf
    assert outside_seconds("all-reduce", 1200, 1, V4) == 0


def test_slices_add_the_data_centre_network_to_a_step():
    single, double = estimate(facts()), estimate(two_slices())
    assert double["outside_bytes"] == 10**8 // 8
    assert double["seconds"]["outside"] == 12.5e6 / 3.125e9
    inside = ring_seconds("reduce-scatter", 10**8, 8, V5E)
    assert double["seconds"]["network"] == pytest.approx(inside + 12.5e6 / 3.125e9)
    assert "outside" not in single["seconds"] and "outside_bytes" not in single
    # Twice the chips compute twice the images in nearly the same time.
    assert single["rate"] * 0.9 < double["rate"] < single["rate"]


def test_the_two_devices_of_a_chip_share_its_data_centre_network():
    predicted = estimate(two_slices(chip="tpu7x", devices=32, chips=16))
    assert predicted["outside_bytes"] == 2 * 10**8 // 8
    assert predicted["seconds"]["outside"] == 25e6 / 12.5e9


def test_efficiency_is_that_of_more_or_fewer_slices_of_the_same_size():
    efficiency = estimate(two_slices())["efficiency"]
    alone = 0.1

    def expected(inside: int, slices: int) -> float:
        network = ring_seconds("reduce-scatter", 10**8, inside, V5E)
        network += outside_seconds("all-reduce", 12.5e6, slices, V5E)
        return alone / (alone + network)

    assert efficiency == pytest.approx(
        {
            1: 1.0,
            4: expected(4, 1),
            16: expected(8, 2),
            64: expected(8, 8),
            256: expected(8, 32),
            1024: expected(8, 128),
            4096: expected(8, 512),
        }
    )


def test_without_a_published_data_centre_network_no_speed_is_predicted():
    predicted = estimate(two_slices(chip="v4"))
    assert predicted == {
        "fits": True,
        "memory": 8 * GIB,
        "limit": 16 * GIB,
        "outside_bytes": 10**8 // 8,
    }


def test_no_speed_is_predicted_for_unknown_chips():
    predicted = estimate(facts(chip=""))
    assert predicted == {"fits": True, "memory": 8 * GIB, "limit": 16 * GIB}


def test_a_program_for_one_device_predicts_no_scaling():
    assert estimate(facts(devices=1, chips=1, hosts=1))["efficiency"] == {}


def test_the_chip_of_a_topology_is_found():
    for name in CHIPS:
        assert chip_of(f"{name}:2x2x1") == name
    assert chip_of("local") == ""
