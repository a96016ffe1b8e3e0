"""Tests of the tables of `bench`, and of all programs that need no other framework."""

import argparse
import inspect
import json
import os
import pathlib
import pkgutil
import re
import subprocess
import sys
import zipfile

import pytest

from resnet_jax.bench import __main__ as command
from resnet_jax.bench import convolutions, own_programs, profiler_trace, table, worker
from resnet_jax.bench import input as input_bench
from resnet_jax.bench.step_and_inference import STEP
from resnet_jax.bench.worker import LeftOutError, Worker
from resnet_jax.errors import UserError
from resnet_jax.models.cost import count
from resnet_jax.models.zoo import get_entry
from resnet_jax.training import programs
from resnet_jax.training.experiment import set_up
from tests.helpers.pictures import encode, noise

NAMES = ("name", "unit", "value", "spread", "peer", "peer_value", "peer_spread")
KEYS = (*NAMES, "ratio", "repeats", "left_out")


def measure(tmp_path: pathlib.Path, *arguments: str) -> list[dict]:
    """Runs a benchmark and returns the tables in its JSON file."""
    path = tmp_path / "tables.json"
    command.main(["bench", *arguments, f"--json={path}"])
    return json.loads(path.read_text())


# Tests of what all tables share.


def test_a_row_has_the_median_and_the_spread_of_value_and_baseline():
    row = table.row("speed", "images/s", [3.0, 1.0, 2.0], "torch", [4.0, 8.0])
    assert tuple(row) == KEYS
    assert (row["value"], row["spread"]) == (2, [1, 3])
    assert (row["peer_value"], row["peer_spread"]) == (6, [4, 8])
    assert row["ratio"] == 2 / 6
    cells = table.as_markdown(row).split(" | ")
    assert cells[0] == "| speed"
    assert cells[1:] == [
        *("2 (1 to 3) images/s", "torch", "6 (4 to 8)", "0.33 |"),
    ]


def test_the_table_says_why_a_baseline_is_left_out():
    reason = "torch is not installed"
    row = table.row("speed", "images/s", [1.0], "torch", left_out=reason)
    assert row["ratio"] is None
    line = table.as_markdown(row)
    assert "| torch | left out: torch is not installed |" in line
    # The row has as many cells as the head.
    assert line.count("|") == table.HEAD.splitlines()[0].count("|")


# The arguments that were passed to each made-up benchmark.
PASSED: dict[str, argparse.Namespace] = {}


def made_up_rows(args: argparse.Namespace):
    PASSED[args.what] = args
    yield table.row(args.what, "s", [1.0])


MADE_UP = table.Benchmark(table.add_torch, made_up_rows, table.JAX, table.TORCH)


@pytest.fixture
def made_up(monkeypatch):
    """Replaces the benchmarks of `all`; returns the arguments passed to each."""
    PASSED.clear()
    for name in command.ALL:
        monkeypatch.setitem(command.TABLES, name, f"{__name__}:MADE_UP")
    return PASSED


def test_all_runs_its_benchmarks_with_the_shared_flags(made_up, tmp_path, capsys):
    tables = measure(tmp_path, "all", "--repeats=7", "--torch=no-such-python")
    assert list(made_up) == list(command.ALL)
    for name, one_table in zip(command.ALL, tables, strict=True):
        # The command above a table makes that table again.
        line = f"python -m resnet_jax.bench {name} --repeats=7 --torch=no-such-python"
        assert one_table["command"] == line
        assert made_up[name].repeats == 7
        assert one_table["cores"] == len(os.sched_getaffinity(0))
        assert one_table["versions"].keys() >= {"python", "jax", "jaxlib", "flax"}
        assert one_table["peers_versions"] == {}
    output = capsys.readouterr().out
    assert output.count(table.HEAD) == len(command.ALL)
    assert "baselines in an interpreter that does not run" in output
    assert "GiB, load" in output


@pytest.mark.parametrize(("busy", "warns"), [(0.04, False), (0.5, True)])
def test_a_table_warns_of_a_busy_machine(busy, warns):
    machine = table.machine(STEP.packages) | {"busy": busy}
    assert ("Other work took 50% of the cores" in table.describe(machine)) == warns


def test_mistakes_in_the_arguments_keep_the_results_of_before(tmp_path):
    path = tmp_path / "tables.json"
    path.write_text("earlier results")
    with pytest.raises(UserError, match="no network 'resnet5O'"):
        command.main(["bench", "step", "--model=resnet5O", f"--json={path}"])
    assert path.read_text() == "earlier results"


def test_an_interrupted_benchmark_keeps_the_rows_that_it_has_measured(tmp_path):
    def rows():
        yield table.row("first", "s", [1.0])
        raise KeyboardInterrupt

    path = tmp_path / "tables.json"
    machine = table.machine(STEP.packages)
    with pytest.raises(KeyboardInterrupt):
        table.Report(path).add("the command", machine, rows())
    (saved,) = json.loads(path.read_text())
    assert [row["name"] for row in saved["rows"]] == ["first"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json=/no/such/folder/x.json"], "there is no directory /no/such/folder"),
        (["--model=resnet5O"], "no network 'resnet5O'. Did you mean"),
        (["--dtype=float32,bfloat"], "no --dtype=bfloat. Did you mean bfloat16"),
        (["--profile=/dev/null/x"], "/dev/null/x cannot be used: Not a directory."),
    ],
)
def test_mistakes_in_the_arguments_of_step_are_reported(arguments, message, capsys):
    with pytest.raises(UserError, match=re.escape(message)):
        command.main(["bench", "step", *arguments])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("convolutions --dtype=half", "no --dtype=half. Known: float32, bfloat16."),
        ("overhead --steps=1", "--steps=1 leaves no step to measure, since"),
        ("overhead --config=configs/r50.py:x", "r50.py has no variants"),
        ("scale --saved=resnet5O", "no network 'resnet5O'. Did you mean"),
        ("scale --topology=v5z", "no topology 'v5z'. Did you mean"),
        ("scale --topology=local", "--topology=local is not a TPU slice."),
        ("schedule --config=configs/r50.py --config.batch_size=0", "batch_size=0 must"),
        (
            "schedule --config=configs/r50.py --save=/no/x.png",
            "/no/x.png cannot be written: ",
        ),
        (
            "schedule --config=configs/r50.py --save=x.foo",
            "x.foo cannot be written: no picture has the suffix .foo",
        ),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(line, message):
    with pytest.raises(UserError, match=re.escape(message)):
        command.main(["bench", *line.split()])


@pytest.mark.parametrize(
    "line",
    [
        "step --repeats=0",
        "step --image_size=0",
        "convolutions --batch_size=8,0",
        "overhead --batch_size=a",
        "scale --processes=-1",
        "input --cores=0",
        "augment --config=configs/r50.py --save=x.png --rows=0",
        "schedule --config=configs/r50.py --train_size=-5",
    ],
)
def test_numbers_must_be_whole_and_above_zero(line):
    wrong = line.rpartition("=")[2].rpartition(",")[2]
    with pytest.raises(UserError, match=f"'{wrong}' is not a whole number above 0"):
        command.main(["bench", *line.split()])


# Tests of the implementations.


def test_another_network_does_not_get_the_overrides_of_the_config():
    # The config overrides a field that a VGG lacks.
    config = own_programs.short_config("configs/r50.py", "vgg19_bn", 96, 8, "float32")
    config.model.bn_group_size = "global"
    assert set_up(config).model.spec.num_classes == 1000


@pytest.mark.parametrize(("model", "size"), [("resnet50", 96), ("cifar_resnet20", 32)])
def test_a_step_trains_all_parameters_of_the_published_network(model, size):
    setup = set_up(own_programs.step_config(model, size, 8, "float32"))
    assert count(programs.state_like(setup).params) == get_entry(model).params


def test_an_implementation_that_cannot_run_gives_the_reason(tmp_path):
    case = ("inference", "torch eager, channels_last", "resnet18", 32, 1, "float32")
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError('No module', name='torch')\n"
    )
    path = f"{tmp_path}:{pathlib.Path(table.__file__).parents[2]}"
    with pytest.raises(LeftOutError, match=r"^torch is not installed$"):
        Worker(sys.executable, *case, PYTHONPATH=path).ask("warm")
    with pytest.raises(LeftOutError, match="no-python: No such file"):
        Worker(str(tmp_path / "no-python"), *case).ask("warm")
    with pytest.raises(LeftOutError, match="it ended with exit code 1"):
        Worker("/bin/false", *case).ask("warm")


@pytest.mark.parametrize("task", worker.IMPLEMENTATIONS)
def test_implementations_are_functions_of_a_case(task):
    for path in worker.IMPLEMENTATIONS[task].values():
        if "torch" not in path:
            parameters = inspect.signature(pkgutil.resolve_name(path)).parameters
            assert list(parameters) == ["model", "size", "batch", "dtype"]


def test_a_worker_does_not_import_jax_by_itself():
    code = "import resnet_jax.bench.worker, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("calls", "seconds", "made"), [(1, 0.5, 3), (2, 0.0, 2), (4, 0.5, 4)]
)
def test_calls_are_timed_until_both_minimums_are_reached(calls, seconds, made):
    # Each call takes 0.2 s by this clock.
    now = [0.0]

    def call() -> None:
        now[0] += 0.2

    mean = worker.seconds_of_call(call, calls, seconds, clock=lambda: now[0])
    assert mean == pytest.approx(0.2)
    assert now[0] == pytest.approx(0.2 * made)


SMALL = (
    *("--model=cifar_resnet20", "--image_size=16", "--batch_size=4"),
    "--dtype=float32",
)


@pytest.mark.slow
def test_the_step_is_measured_and_traced_though_baselines_are_left_out(
    monkeypatch, capfd, tmp_path
):
    # The worker must not see the eight devices of the tests.
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    trace = tmp_path / "trace"
    (saved,) = measure(
        tmp_path,
        *("step", *SMALL, "--repeats=2", f"--profile={trace}", "--torch=/bin/false"),
    )
    reasons = {row["peer"]: row["left_out"] for row in saved["rows"]}
    # Only networks with bottlenecks are made of stock Linen layers.
    assert reasons == {
        "stock Linen": "stock Linen has no cifar_resnet20 here",
        "torch eager, channels_last": "it ended with exit code 1",
    }
    for row in saved["rows"]:
        assert row["value"] > 0 and row["repeats"] == 2
        assert row["peer_value"] is None
    assert list(trace.rglob("*.xplane.pb"))
    printed = capfd.readouterr().err
    costs = re.findall(r"^ +(\d+\.\d+) ms  (\S+)$", printed, re.MULTILINE)
    assert len(costs) == 10
    assert len({name for _, name in costs}) == 10
    seconds = [float(cost) for cost, _ in costs]
    assert seconds == sorted(seconds, reverse=True)
    # The newest trace in the folder is the printed one.
    again = profiler_trace.costliest(trace)
    assert [name for name, _ in again] == [name for _, name in costs]


@pytest.mark.long
def test_compiling_is_measured_fresh_and_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    # With the tests' flags, programs compile so fast that jax does not cache them.
    monkeypatch.delenv("XLA_FLAGS")
    (saved,) = measure(tmp_path, "compile", *SMALL, "--repeats=1")
    fresh, cached, answer = saved["rows"]
    assert fresh["name"].endswith("fresh") and cached["name"].endswith("the cache")
    # The second process traces like the first one, but compiles nothing.
    assert 0 < cached["value"] < fresh["value"]
    assert "stock Linen has no" in fresh["left_out"]
    assert "main --help" in answer["name"]
    assert answer["value"] > 0 and answer["peer_value"] > 0


@pytest.mark.long
def test_the_whole_program_is_compared_with_its_bare_step(tmp_path):
    size = ("--image_size=16", "--batch_size=16", "--steps=8")
    (saved,) = measure(tmp_path, "overhead", *size, "--repeats=1")
    (row,) = saved["rows"]
    assert row["peer"] == "bare compiled step"
    assert row["ratio"] == row["value"] / row["peer_value"] > 0


@pytest.fixture
def jpegs(tmp_path) -> pathlib.Path:
    """Makes a folder of eight JPEGs."""
    for index in range(8):
        picture = encode(noise(index, 300, 260), "JPEG")
        (tmp_path / f"{index}.jpg").write_bytes(picture)
    return tmp_path


@pytest.mark.slow
def test_the_input_benchmark_yields_a_row_for_each_measurement(jpegs):
    names = ("ours", "bare", "ours eval", "small", "fast pixels")
    measurements = [
        each._replace(baseline=each.baseline if each.baseline in names else "")
        for each in input_bench.MEASUREMENTS
        if each.ours in names
    ]
    arguments = ["--cores=1", "--batches=4", "--repeats=1", f"--images={jpegs}"]
    args = command.make_parser("input").parse(arguments)
    rows = list(input_bench.rows(args, measurements))
    assert [row["name"] for row in rows] == [each.name for each in measurements]
    for row in rows:
        assert tuple(row) == KEYS
        assert row["value"] > 0
        if row["peer"]:
            assert row["ratio"] == row["value"] / row["peer_value"]


def test_a_failure_of_this_librarys_input_pipeline_is_an_error(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no JPEG")
    args = command.make_parser("input").parse([f"--images={tmp_path}", "--batches=1"])
    with pytest.raises(UserError, match="ours on originals: it ended with exit code 1"):
        input_bench.run_implementation("ours", "originals", args)


@pytest.mark.parametrize("zipped", [False, True])
def test_broken_images_are_named_before_anything_is_measured(zipped, tmp_path, capsys):
    images, name = tmp_path, f"{tmp_path}/broken.jpg"
    if zipped:
        images = tmp_path / "images.zip"
        name = f"{images}/broken.jpg"
        with zipfile.ZipFile(images, "w") as archive:
            archive.writestr("broken.jpg", b"no JPEG")
    else:
        (tmp_path / "broken.jpg").write_bytes(b"no JPEG")
    message = f"{name}: cannot be decoded: not an image in a known format. Repair or"
    with pytest.raises(UserError, match=re.escape(message)):
        measure(tmp_path, "input", f"--images={images}")
    assert not capsys.readouterr().out


def test_the_input_benchmark_finds_scikit_learns_two_photographs():
    jpegs = input_bench.read_jpegs(input_bench.SAMPLE)
    assert len(jpegs) == 2
    assert all(content.startswith(b"\xff\xd8") for content in jpegs.values())


@pytest.mark.slow
def test_the_memory_of_a_loader_with_workers_does_not_grow(jpegs):
    contents = list(input_bench.read_jpegs(jpegs).values())
    mib = input_bench.memory_of_loader(contents, batch_size=8)
    assert len(mib) == 50
    assert mib[-1] - mib[9] < 100


def test_every_convolution_of_a_network_is_measured(tmp_path):
    small = ["--model=cifar_resnet20", "--image_size=8", "--batch_size=2"]
    (saved,) = measure(
        tmp_path, "convolutions", *small, "--repeats=1", "--dtype=float32"
    )
    # They are the stem's, those of each stage and the two strided ones, each measured
    # in three directions.
    shapes = convolutions.shapes_of("cifar_resnet20", 8)
    assert sorted(shapes.values()) == [1, 1, 1, 5, 5, 6]
    assert len(saved["rows"]) == 3 * len(shapes)
