"""The arithmetic of predictions, against numbers worked out by hand."""

import math

import pytest

from resnet_jax.compiler.chips import CHIPS, HOP, chip_of
from resnet_jax.plan import calibration
from resnet_jax.plan.estimate import predict
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
    # As published elsewhere: v3 940 MHz, v4 1050 MHz (Jouppi et al. 2023,
    # arXiv:2304.01433, table 4), v5p 1750 MHz.
    [("v3", 0.94), ("v4", 1.05), ("v5p", 1.75), ("v5e", 1.5), ("v6e", 1.75)],
)
def test_the_clock_follows_from_the_peak(name, gigahertz):
    # Published peaks have three digits.
    assert CHIPS[name].clock == pytest.approx(gigahertz * 1e9, rel=5e-3)


def test_a_step_is_timed_by_operations_by_bytes_and_by_cycles():
    step = {"flops": 1.97e12, "hbm_bytes": 8.19e9, "cycles": V5E.clock}
    assert seconds_of(step, V5E, 1) == pytest.approx(
        {"compute": 0.01, "memory": 0.01, "cycles": 1.0}
    )
    # Two devices share the peaks of a chip, and each has its own clock.
    assert seconds_of(step, V5E, 2) == pytest.approx(
        {"compute": 0.02, "memory": 0.02, "cycles": 1.0}
    )


def test_an_all_reduce_goes_round_twice_and_others_once():
    # 4 x 4 chips: 15/16 of the bytes, and two rings of four with two hops each.
    size = 2_000_000_000
    once = 15 / 16 * size / 200e9 + 4 * HOP
    assert ring_seconds("reduce-scatter", size, 16, V5E) == pytest.approx(once)
    assert ring_seconds("all-reduce", size, 16, V5E) == pytest.approx(2 * once)
    # A torus of three axes: 4 x 4 x 4 chips, three rings with two hops each.
    sent = 63 / 64 * size / (1.1e15 / 4096)
    expected = 2 * (sent + 6 * HOP)
    assert ring_seconds("all-reduce", size, 64, V4) == pytest.approx(expected)


def test_one_chip_sends_nothing():
    assert ring_seconds("all-reduce", 10**9, 1, V5E) == 0


def test_beyond_a_pod_what_a_chip_holds_goes_round_outside():
    size = 2_560_000_000
    inside = ring_seconds("all-reduce", size, 256, V5E)
    # Four pods: each chip's 10 MB, three quarters of it twice, at 3.125 GB/s.
    outside = 2 * 3 / 4 * 10e6 / 3.125e9
    both = ring_seconds("all-reduce", size, 1024, V5E)
    assert both == pytest.approx(inside + outside)
    # Where nothing is published, nothing is told.
    assert ring_seconds("all-reduce", size, 8192, V4) == math.inf


def test_only_collectives_over_all_devices_grow_with_the_slice():
    over = {"kind": "all-reduce", "bytes": 10**6, "times": 3}
    groups = [over | {"devices": 4}]
    every = [over | {"devices": 8}]
    of_four, of_eight, of_many = (
        3 * ring_seconds("all-reduce", 10**6, chips, V5E) for chips in (4, 8, 256)
    )
    assert network_seconds(groups, 8, 8, 256, V5E) == pytest.approx(of_four)
    assert network_seconds(every, 8, 8, 8, V5E) == pytest.approx(of_eight)
    assert network_seconds(every, 8, 8, 256, V5E) == pytest.approx(of_many)
    # Four of eight devices, two a chip, are two chips.
    of_two = 3 * ring_seconds("all-reduce", 10**6, 2, V5E)
    assert network_seconds(groups, 4, 8, 256, V5E) == pytest.approx(of_two)


def test_a_run_is_predicted_from_its_longest_measure():
    found = predict(facts(), input_rate=600.0, price=1.2)
    # By cycles 100 ms; 1e8 bytes at 200 GB/s, 7/8 twice: 0.9 ms, and hops.
    hops = 2 * 2 * (8**0.5) / 2 * HOP
    network = 2 * 7 / 8 * 1e8 / 200e9 + hops
    step = 0.1 + network
    assert found["seconds"] == pytest.approx(
        {"compute": 0.01, "memory": 0.05, "cycles": 0.1, "network": network}
    )
    assert found["bound"] == "memory"
    assert found["rate"] == pytest.approx(128 / step)
    # Without the cycles, the bytes' 50 ms.
    assert found["most"] == pytest.approx(128 / (0.05 + network))
    assert found["utilization"] == pytest.approx(1.97e12 / step / 197e12)
    assert found["efficiency"][1] == 1
    by_network = 2 * 255 / 256 * 1e8 / 200e9 + 2 * 2 * 8 * HOP
    assert found["efficiency"][256] == pytest.approx(0.1 / (0.1 + by_network))
    # 50,000 images are 49 batches of 1024, by bytes of 50 ms each, 36 times.
    evaluation = 36 * 49 * 0.05 / 3600
    assert found["eval_hours"] == pytest.approx(evaluation)
    assert found["hours"] == pytest.approx(36_000 * step / 3600 + evaluation)
    assert found["cost"] == pytest.approx(found["hours"] * 8 * 1.2)
    # Half of the chips' images, 5.1e3 a second, at 600 a core.
    assert found["host_rate"] == pytest.approx(4 * 128 / step)
    assert found["cores"] == 9


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
def test_the_bound_is_what_takes_longest(slower, bound):
    assert predict(facts(train=facts()["train"] | slower))["bound"] == bound


def test_a_network_that_takes_less_than_computation_is_not_the_bound():
    # 0.1 s by the cycles, of which memory would take half; the network 0.09.
    size = round(0.09 / (2 * 7 / 8) * V5E.network)
    collectives = [{"kind": "all-reduce", "bytes": size, "devices": 8, "times": 1}]
    found = predict(facts(train=facts()["train"] | {"collectives": collectives}))
    assert 0.05 < found["seconds"]["network"] < 0.1
    assert found["bound"] == "memory"


def test_what_is_not_known_of_many_pods_is_none():
    found = predict(facts(chip="v3"))
    assert found["efficiency"][4096] is None
    assert 0 < found["efficiency"][1024] < 1


def test_computation_is_calibrated_where_rates_were_published():
    by_cycles = facts()["train"] | {"cycles": V4.clock / 10}
    found = predict(facts(chip="v4", train=by_cycles))
    factor = calibration.factor_of("v4")
    # Not the network, and not below the peaks: 4.095e10 bytes at 1200 GB/s.
    network = found["seconds"]["network"]
    assert 0.1 / factor > 4.095e10 / 1200e9
    assert found["factor"] == factor
    assert found["rate"] == pytest.approx(128 / (0.1 / factor + network))
    assert found["uncalibrated"] == pytest.approx(128 / (0.1 + network))
    for told, (one, deviation) in zip(
        found["published"], calibration.deviations("v4"), strict=True
    ):
        assert (told["rate"], told["deviation"]) == (one.rate, deviation)
    hours = 36_000 * 128 / found["rate"] / 3600
    assert found["hours"] == pytest.approx(hours + found["eval_hours"])
    # Of v5e nothing was published, and nothing of float32.
    for other in (facts(), facts(chip="v4", train=by_cycles, dtype="float32")):
        found = predict(other)
        assert found["factor"] is None
        assert found["rate"] == found["uncalibrated"]


def test_no_calibration_goes_beyond_the_published_peaks():
    # 35 ms of cycles, but 34.1 ms of bytes.
    train = facts()["train"] | {"cycles": 0.035 * V4.clock}
    found = predict(facts(chip="v4", train=train))
    assert found["rate"] == found["most"] > found["uncalibrated"]


def test_what_does_not_fit_gets_no_speed():
    train = {"wanted": 20 * GIB, "limit": 15 * GIB, "seconds": 1.0}
    assert predict(facts(train=train)) == {
        "fits": False,
        "memory": 20 * GIB,
        "limit": 15 * GIB,
    }
    # As of a machine whose compiler does not refuse.
    found = predict(facts(chip="", memory=7 * GIB))
    assert found == {"fits": False, "memory": 8 * GIB, "limit": 7 * GIB}


def test_what_a_chip_sends_to_other_slices_takes_the_data_centre_network():
    # An all-reduce sends twice, all others once, what other slices have or lack.
    assert outside_bytes("all-reduce", 1200, 2) == 1200
    assert outside_bytes("all-reduce", 1200, 4) == 1800
    assert outside_bytes("all-gather", 1200, 4) == 900
    assert outside_bytes("all-reduce", 1200, 1) == 0
    assert outside_seconds("all-reduce", 1200, 2, V5E) == 1200 / 3.125e9
    assert outside_seconds("all-reduce", 1200, 2, V4) == math.inf
    assert outside_seconds("all-reduce", 1200, 1, V4) == 0


def test_slices_add_the_data_centre_network_to_a_step():
    one, two = predict(facts()), predict(two_slices())
    assert two["outside_bytes"] == 10**8 // 8
    assert two["seconds"]["outside"] == 12.5e6 / 3.125e9
    inside = ring_seconds("reduce-scatter", 10**8, 8, V5E)
    assert two["seconds"]["network"] == pytest.approx(inside + 12.5e6 / 3.125e9)
    assert "outside" not in one["seconds"] and "outside_bytes" not in one
    # Twice the images at nearly twice the rate, on twice the chips.
    assert one["rate"] * 0.9 < two["rate"] < one["rate"]


def test_the_two_devices_of_a_chip_share_its_data_centre_network():
    found = predict(two_slices(chip="tpu7x", devices=32, chips=16))
    assert found["outside_bytes"] == 2 * 10**8 // 8
    assert found["seconds"]["outside"] == 25e6 / 12.5e9


def test_other_numbers_of_chips_are_more_or_fewer_of_the_same_slices():
    efficiency = predict(two_slices())["efficiency"]
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


def test_without_a_published_data_centre_network_no_speed_is_told():
    found = predict(two_slices(chip="v4"))
    assert found == {
        "fits": True,
        "memory": 8 * GIB,
        "limit": 16 * GIB,
        "outside_bytes": 10**8 // 8,
    }


def test_unknown_chips_get_no_speed():
    found = predict(facts(chip=""))
    assert found == {"fits": True, "memory": 8 * GIB, "limit": 16 * GIB}


def test_a_program_for_one_device_says_nothing_of_scaling():
    assert predict(facts(devices=1, chips=1, hosts=1))["efficiency"] == {}


def test_every_chip_can_be_named():
    for name in CHIPS:
        assert chip_of(f"{name}:2x2x1") == name
    assert chip_of("local") == ""
