"""Tests of the published rates of ResNet-50 and of the factors derived from them."""

import dataclasses

import pytest

from resnet_jax.compiler.chips import CHIPS
from resnet_jax.plan import calibration
from resnet_jax.plan.calibration import PUBLISHED, STOCK, Published, Stock
from resnet_jax.plan.time_model import ring_seconds

KNOWN = sorted(PUBLISHED.keys() & STOCK.keys())


@pytest.fixture
def made_up(monkeypatch):
    """Invents rates for v5e; the compiler estimates 0.2 s for a step of 100 images.

    Returns:
      The rates of one chip and of eight chips.
    """
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


def test_the_factor_follows_from_the_fastest_published_rate(made_up):
    # 100 images take 0.1 s, and by the compiler 0.2 s. One chip needs no network.
    assert calibration.factor_of("v5e") == pytest.approx(2)
    one, eight = made_up
    assert calibration.estimate("v5e", one) == pytest.approx(500)
    network = ring_seconds("all-reduce", 2 * 25_557_032, 8, CHIPS["v5e"])
    # Half of the images are computed at the calibrated speed; the network comes on top.
    slower = 50 / (0.05 + network)
    assert calibration.estimate("v5e", eight, 2.0) == pytest.approx(slower)
    assert dict(calibration.deviations("v5e")) == {
        one: pytest.approx(0),
        eight: pytest.approx(500 / slower - 1),
    }


def test_the_factor_applies_to_computation_only(made_up, monkeypatch):
    _, eight = made_up
    monkeypatch.setitem(PUBLISHED, "v5e", (eight,))
    network = ring_seconds("all-reduce", 2 * 25_557_032, 8, CHIPS["v5e"])
    # A step of 50 images takes 0.1 s; the chips compute except during the network time.
    assert calibration.factor_of("v5e") == pytest.approx(0.1 / (0.1 - network))
    assert calibration.deviations("v5e") == [(eight, pytest.approx(0))]


def test_two_devices_of_a_chip_compute_in_parallel(made_up, monkeypatch):
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
    # The prediction is never faster than the peaks allow.
    assert calibration.calibrated(seconds, 2.0) == 2


@pytest.mark.parametrize("chip", KNOWN)
def test_rates_and_factors_are_physically_possible(chip):
    peak = CHIPS[chip]
    for published in PUBLISHED[chip]:
        # Each image takes three passes of 4.089e9 MACs, of two operations each.
        assert published.rate * 3 * 2 * 4.089e9 < peak.flops, published.source
    # The compiler is too cautious by at most a factor of two, since it assumes half of
    # the bandwidth.
    assert 1 < calibration.factor_of(chip) < 2


def test_rates_are_as_published():
    # MLPerf's logs have 32,580 images/s for v3-32, and 220,900 for v4-128.
    assert PUBLISHED["v3"][0].rate == pytest.approx(32_580 / 16, rel=1e-3)
    assert PUBLISHED["v4"][0].rate == pytest.approx(220_900 / 64, rel=1e-3)
    # The source has 8,090 images/s for four chips.
    assert PUBLISHED["v3"][1].rate == pytest.approx(8090 / 4, rel=1e-3)
