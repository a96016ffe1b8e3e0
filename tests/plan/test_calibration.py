"""Published rates of ResNet-50 and the factors that follow from them."""

import dataclasses

import pytest

from resnet_jax.compiler.chips import CHIPS
from resnet_jax.plan import calibration
from resnet_jax.plan.calibration import PUBLISHED, STOCK, Published, Stock
from resnet_jax.plan.time_model import ring_seconds

KNOWN = sorted(PUBLISHED.keys() & STOCK.keys())


@pytest.fixture
def made_up(monkeypatch):
    """v5e: a step of 100 images takes 0.2 s by the compiler, one device a chip."""
    clock = CHIPS["v5e"].clock
    stock = Stock(
        images=100,
        devices=1,
        flops=0.0,
        hbm_bytes=0.0,
        cycles=clock / 5,
        libtpu="1.2",
        jax="3.4",
    )
    one, eight = Published(1000.0, 1, 100, "a"), Published(500.0, 8, 50, "b")
    monkeypatch.setitem(STOCK, "v5e", stock)
    monkeypatch.setitem(PUBLISHED, "v5e", (eight, one))
    return one, eight


def test_the_factor_is_that_of_the_fastest_published_rate(made_up):
    # 100 images in 0.1 s, where the compiler expects 0.2 s; one chip sends nothing.
    assert calibration.factor_of("v5e") == pytest.approx(2)
    one, eight = made_up
    assert calibration.estimate("v5e", one) == pytest.approx(500)
    network = ring_seconds("all-reduce", 2 * 25_557_032, 8, CHIPS["v5e"])
    # Half of the images, at the calibrated speed, and what crosses the network.
    slower = 50 / (0.05 + network)
    assert calibration.estimate("v5e", eight, 2.0) == pytest.approx(slower)
    assert dict(calibration.deviations("v5e")) == {
        one: pytest.approx(0),
        eight: pytest.approx(500 / slower - 1),
    }


def test_the_network_is_not_part_of_the_factor(made_up, monkeypatch):
    _, eight = made_up
    monkeypatch.setitem(PUBLISHED, "v5e", (eight,))
    network = ring_seconds("all-reduce", 2 * 25_557_032, 8, CHIPS["v5e"])
    # A step of 50 images took 0.1 s, of which the chips computed all but the network.
    assert calibration.factor_of("v5e") == pytest.approx(0.1 / (0.1 - network))
    assert calibration.deviations("v5e") == [(eight, pytest.approx(0))]


def test_two_devices_of_a_chip_compute_side_by_side(made_up, monkeypatch):
    both = dataclasses.replace(STOCK["v5e"], devices=2)
    monkeypatch.setitem(STOCK, "v5e", both)
    assert calibration.factor_of("v5e") == pytest.approx(1)


def test_chips_without_a_published_rate_are_not_calibrated():
    assert set(CHIPS) - set(KNOWN) >= {"v5e", "v5p", "v6e", "tpu7x"}
    for chip in set(CHIPS) - set(KNOWN):
        assert calibration.factor_of(chip) is None
        assert calibration.deviations(chip) == []
    seconds = {"compute": 1.0, "memory": 2.0, "cycles": 3.0}
    assert calibration.calibrated(seconds, None) == 3
    assert calibration.calibrated(seconds, 1.2) == pytest.approx(2.5)
    # The peaks allow no more.
    assert calibration.calibrated(seconds, 2.0) == 2


@pytest.mark.parametrize("chip", KNOWN)
def test_a_factor_is_one_that_silicon_allows(chip):
    peak = CHIPS[chip]
    for one in PUBLISHED[chip]:
        # Twice 4.1e9 MACs, three times, for each image.
        assert one.rate * 3 * 2 * 4.089e9 < peak.flops, one.source
    # The compiler is cautious by at most the half of the bandwidth that it leaves out.
    assert 1 < calibration.factor_of(chip) < 2


def test_rates_are_those_of_their_sources():
    # MLPerf's log of v3-32: 32,580 images/s; of v4-128: 220,900.
    assert PUBLISHED["v3"][0].rate == pytest.approx(32_580 / 16, rel=1e-3)
    assert PUBLISHED["v4"][0].rate == pytest.approx(220_900 / 64, rel=1e-3)
    # Four chips made 8,090 images/s.
    assert PUBLISHED["v3"][1].rate == pytest.approx(8090 / 4, rel=1e-3)
