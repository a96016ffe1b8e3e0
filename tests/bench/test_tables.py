"""Every contender of the benchmarks that needs no other framework runs."""

import json
import pathlib

import pytest

from resnet_jax.bench import __main__ as command
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
