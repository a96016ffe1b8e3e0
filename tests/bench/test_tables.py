"""Every contender of the benchmarks that needs no other framework runs."""

import json
import pathlib
import re

import pytest

from resnet_jax.bench import __main__ as command
from resnet_jax.bench import convolutions, speed
from resnet_jax.bench import input as input_bench
from tests.data.pictures import encode, noise

KEYS = ("name", "value", "unit", "peer", "peer_value", "ratio", "spread")


@pytest.fixture
def jpegs(tmp_path) -> pathlib.Path:
    for index in range(8):
        picture = encode(noise(index, 300, 260), "JPEG")
        (tmp_path / f"{index}.jpg").write_bytes(picture)
    return tmp_path


@pytest.mark.slow
def test_the_input_benchmark_gives_a_row_a_measurement(jpegs, monkeypatch, capsys):
    ours = ("ours", "bare", "ours eval", "small", "fast pixels")
    monkeypatch.setattr(
        input_bench,
        "MEASUREMENTS",
        [
            (name, who, peer if peer in ours else "", what)
            for name, who, peer, what in input_bench.MEASUREMENTS
            if who in ours
        ],
    )
    arguments = ["--cores=1", "--batches=4", "--repeats=1", "--json"]
    command.main(["bench", "input", str(jpegs), *arguments])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == len(input_bench.MEASUREMENTS)
    for row in rows:
        assert tuple(row) == KEYS
        assert row["value"] > 0
        if row["peer"]:
            assert row["ratio"] == row["value"] / row["peer_value"]


@pytest.mark.slow
def test_workers_are_counted_and_their_memory_is_constant(jpegs, monkeypatch):
    monkeypatch.setattr(input_bench, "BATCH", 8)
    found = input_bench._memory(input_bench.read_jpegs(jpegs))
    assert len(found) == 50
    # This process alone takes more than its imports; two workers import the same.
    assert found[-1] - found[9] < 100


@pytest.mark.slow
def test_the_step_and_its_inference_are_measured_and_what_has_no_peer_is_told(
    monkeypatch, capfd, tmp_path
):
    # A process of its own, without the eight devices of the tests.
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    monkeypatch.setattr(speed, "STEP", ("stock Linen", "no such contender"))
    small = ["--model=cifar_resnet20", "--image_size=32", "--batch_size=4"]
    small += ["--dtype=float32", "--repeats=2", "--json"]
    command.main(["bench", "step", *small, f"--profile={tmp_path}"])
    told = capfd.readouterr()
    (row,) = [json.loads(line) for line in told.out.splitlines()]
    assert tuple(row) == KEYS
    assert row["value"] > 0
    assert row["peer"] == ""
    # Stock Linen has the bottleneck networks only.
    for peer in speed.STEP:
        assert f"{peer} did not run and is left out." in told.err
    costs = re.findall(r"^ +(\d+\.\d+) s  \S+$", told.err, re.MULTILINE)
    assert len(costs) == 10
    assert costs == sorted(costs, key=float, reverse=True)


def test_every_form_of_a_networks_convolutions_is_measured(capsys):
    small = ["--model=cifar_resnet20", "--image_size=8", "--batch_size=2"]
    command.main(["bench", "convolutions", *small, "--repeats=1", "--dtype=float32"])
    rows = capsys.readouterr().out.splitlines()
    # The stem, stages' own and the two strided ones; each in three directions.
    shapes = convolutions.shapes_of("cifar_resnet20", 8)
    assert sorted(shapes.values()) == [1, 1, 1, 5, 5, 6]
    assert len(rows) == 3 * len(shapes)
