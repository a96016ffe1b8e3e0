"""Tests of `bench scale`: its rows, its processes and its predictions."""

import importlib.util
import subprocess
import sys
import time

import psutil
import pytest

from resnet_jax.bench import scale
from resnet_jax.bench.__main__ import make_parser
from resnet_jax.errors import UserError
from resnet_jax.models.cost import count
from resnet_jax.training import programs
from tests.helpers import plans, runs, tiny


@pytest.mark.long
def test_two_processes_measure_their_collectives_and_durations():
    config = tiny.config({"batch_size": 4, "model.bn_group_size": "device"})
    request = {"steps": 2, "between": 0.5, "repeats": 1}
    (alone,) = scale.run_processes(1, {"config": config.to_dict(), **request})
    assert alone["bytes"] == 0
    config.batch_size = 8
    first, second = scale.run_processes(2, {"config": config.to_dict(), **request})
    # Both processes run one program. Its collectives sum the gradients, the statistics
    # and two metrics, in float32.
    state = programs.state_like(tiny.setup())
    sizes = count(state.params) + count(state.batch_stats) + 2
    assert first["bytes"] == second["bytes"] == 4 * sizes
    for result in (alone, first, second):
        assert result["start"] > 0
        for key in ("together", "alone", "between", "save"):
            assert len(result[key]) == 1 and result[key][0] > 0, key
        # The first restore comes before the repeats.
        assert len(result["restore"]) == 2
        # The stall includes the call of save, but steps may be faster than usual.
        assert result["stall"][0] > 0.5 * result["save"][0]
    (saved,) = scale.run_processes(
        1, {"config": config.to_dict(), **request, "steps": 0}
    )
    assert saved["written"][0] > saved["save"][0] > 0


def test_the_failure_of_a_process_is_reported():
    config = tiny.config({"batch_size": 3, "model.bn_group_size": 2})
    request = {"config": config.to_dict(), "steps": 1, "between": 0.1, "repeats": 1}
    with pytest.raises(UserError, match=r"One of 1 processes failed: .*does not"):
        scale.run_processes(1, request)


def test_processes_end_if_the_benchmark_is_stopped_while_it_starts_them(monkeypatch):
    start, started = subprocess.Popen, []

    def interrupted(*args, **kwargs):
        started.append(start(*args, **kwargs))
        if len(started) == 2:
            # The handler of SIGTERM exits like this.
            sys.exit(143)
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    with pytest.raises(SystemExit):
        scale.run_processes(2, {})
    assert [process.wait(timeout=10) for process in started] == [-9, -9]


@pytest.mark.slow
def test_a_stopped_benchmark_ends_its_processes():
    # Processes that JAX has connected ignore SIGTERM.
    process = runs.start_python("-m", "resnet_jax.bench", "scale", "--processes=2")
    children = []
    while len(children) < 2 and process.poll() is None:
        time.sleep(0.1)
        children = psutil.Process(process.pid).children()
    process.terminate()
    code, output = runs.finish(process)
    assert code == 143, output
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_the_share_of_collectives_is_the_extra_time_of_a_step():
    result = {
        "together": [4.0, 5.0, 4.0],
        "alone": [3.0, 3.0, 3.0],
        "bytes": 3_000_000,
        "start": 7.0,
        "stall": [0.5, 1.0, 0.1],
        "between": [10.0, 10.0, 10.0],
        "save": [0.2, 0.3, 0.4],
        "written": [1.0, 1.0, 1.0],
        "restore": [9.0, 2.0, 2.5, 3.0],
    }
    requests = []

    def run(number, request):
        requests.append((number, request["config"]["batch_size"]))
        return [result | {"start": 7.0 + i} for i in range(number)]

    flags = "--processes=1,2 --steps=5 --saved=resnet18 --batch_size=16"
    args = make_parser("scale").parse(flags.split())
    rows = {row["name"].partition(": ")[2]: row for row in scale.rows(args, run)}
    # The last request is for the large checkpoint.
    assert requests == [(1, 16), (2, 32), (1, 16)]
    assert rows["in collectives"]["value"] == pytest.approx(1 / 4)
    assert rows["collectives"]["value"] == 3.0
    assert rows["start-up"]["value"] == 8.0
    stall = rows["stall of a save"]
    assert (stall["value"], stall["peer_value"], stall["ratio"]) == (0.5, 10.0, 0.05)
    assert (stall["spread"], stall["peer_spread"]) == ([0.1, 1.0], [10.0, 10.0])
    assert (rows["first restore"]["value"], rows["restore"]["value"]) == (9.0, 2.5)


def test_the_predicted_share_of_collectives_grows_with_the_slice(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    config = tiny.config()
    rows = list(scale.predictions(config, "v5e:2x4", lambda *_, **__: plans.facts()))
    *shares, size = rows
    assert [row["name"].split()[2] for row in shares] == ["8", "64", "512", "4096"]
    values = [row["value"] for row in shares]
    assert values == sorted(values) and 0 < values[0] < values[-1] < 1
    assert size["value"] == 100.0


def test_without_libtpu_a_note_replaces_the_predictions(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert list(scale.predictions(tiny.config(), "v5e:2x4")) == []
    assert "need libtpu" in capsys.readouterr().err
