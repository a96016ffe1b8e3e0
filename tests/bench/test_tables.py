"""Every contender of the benchmarks that needs no other framework runs."""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import zipfile

import pytest

from resnet_jax.bench import __main__ as command
from resnet_jax.bench import convolutions, own_programs, profiler_trace, step, table
from resnet_jax.bench import input as input_bench
from resnet_jax.bench.step import Child, LeftOutError
from resnet_jax.errors import UserError
from resnet_jax.models.cost import count
from resnet_jax.models.zoo import get_entry
from resnet_jax.training.experiment import set_up
from tests.helpers.pictures import encode, noise

NAMES = ("name", "unit", "value", "spread", "peer", "peer_value", "peer_spread")
KEYS = (*NAMES, "ratio", "repeats", "left_out")


def measure(tmp_path: pathlib.Path, *arguments: str) -> list[dict]:
    """The tables that a command keeps."""
    path = tmp_path / "tables.json"
    command.main(["bench", *arguments, f"--json={path}"])
    return json.loads(path.read_text())


# The form of all tables.


def test_a_row_has_the_median_and_the_spread_of_both_sides():
    found = table.row("speed", "images/s", [3.0, 1.0, 2.0], "torch", [4.0, 8.0])
    assert tuple(found) == KEYS
    assert (found["value"], found["spread"]) == (2, [1, 3])
    assert (found["peer_value"], found["peer_spread"]) == (6, [4, 8])
    assert found["ratio"] == 2 / 6
    cells = table.as_markdown(found).split(" | ")
    assert cells[0] == "| speed"
    assert cells[1:] == [
        *("2 (1 to 3) images/s", "torch", "6 (4 to 8)", "0.33 |"),
    ]


def test_a_peer_that_is_left_out_is_told_in_the_table():
    why = "torch is not installed"
    found = table.row("speed", "images/s", [1.0], "torch", left_out=why)
    assert found["ratio"] is None
    line = table.as_markdown(found)
    assert "| torch | left out: torch is not installed |" in line
    # As many cells as the head has.
    assert line.count("|") == table.HEAD.splitlines()[0].count("|")


# The arguments that each made-up benchmark was given.
TOLD: dict[str, argparse.Namespace] = {}


def made_up_rows(args: argparse.Namespace):
    TOLD[args.what] = args
    yield table.row(args.what, "s", [1.0])


MADE_UP = table.Benchmark(table.add_torch, made_up_rows, table.JAX, table.TORCH)


@pytest.fixture
def made_up(monkeypatch):
    """Benchmarks of `all` that measure nothing; gives what they were told."""
    TOLD.clear()
    for name in command.ALL:
        monkeypatch.setitem(command.TABLES, name, f"{__name__}:MADE_UP")
    return TOLD


def test_all_tables_come_from_one_command(made_up, tmp_path, capsys):
    tables = measure(tmp_path, "all", "--repeats=7", "--torch=no-such-python")
    assert list(made_up) == list(command.ALL)
    for name, found in zip(command.ALL, tables, strict=True):
        told = f"python -m resnet_jax.bench {name} --repeats=7 --torch=no-such-python"
        # What stands above a table makes it again.
        assert found["command"] == told
        assert made_up[name].repeats == 7
        assert found["cores"] == len(os.sched_getaffinity(0))
        assert found["versions"].keys() >= {"python", "jax", "jaxlib", "flax"}
        assert found["peers_versions"] == {}
    output = capsys.readouterr().out
    assert output.count(table.HEAD) == len(command.ALL)
    assert "peers in no Python" in output and "GiB, load" in output


@pytest.mark.parametrize(("busy", "told"), [(0.04, False), (0.5, True)])
def test_a_busy_machine_is_told(busy, told):
    where = table.machine(step.STEP.packages) | {"busy": busy}
    assert ("Other work took 50% of the cores" in table.describe(where)) == told


def test_an_interrupted_benchmark_keeps_what_it_has_measured(made_up, tmp_path):
    def rows(args):
        yield table.row("first", "s", [1.0])
        raise KeyboardInterrupt

    path = tmp_path / "tables.json"
    where = table.machine(step.STEP.packages)
    with pytest.raises(KeyboardInterrupt):
        table.Report(path).add("the command", where, rows(None))
    (found,) = json.loads(path.read_text())
    assert [row["name"] for row in found["rows"]] == ["first"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--json=/no/such/folder/x.json"], "--json=/no/such/folder/x.json: No such"),
        (["--model=resnet5O"], "no network 'resnet5O'. Did you mean"),
        (["--dtype=float32,bfloat"], "no --dtype=bfloat. Did you mean bfloat16"),
        (["--profile=/dev/null/x"], "--profile=/dev/null/x: Not a directory."),
    ],
)
def test_mistakes_get_a_sentence(arguments, message, capsys):
    with pytest.raises(UserError, match=re.escape(message)):
        command.main(["bench", "step", *arguments])
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("convolutions --dtype=half", "no --dtype=half. Known: float32, bfloat16."),
        ("overhead --steps=1", "--steps=1: the first warms up; take two or more."),
        ("overhead --config=configs/r50.py:x", "r50.py has no variants"),
        ("scale --saved=resnet5O", "no network 'resnet5O'. Did you mean"),
        ("scale --topology=v5z", "no topology 'v5z'. Did you mean"),
        ("scale --topology=local", "--topology=local: only TPUs are predicted for."),
        ("schedule --config=configs/r50.py --config.batch_size=0", "batch_size=0 must"),
        (
            "schedule --config=configs/r50.py --save=/no/x.png",
            "/no/x.png cannot be written: ",
        ),
        (
            "schedule --config=configs/r50.py --save=x.foo",
            "x.foo cannot be written: Format",
        ),
    ],
)
def test_mistakes_of_other_tables_are_told_before_anything_is_measured(line, message):
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
def test_numbers_that_cannot_be_are_told(line):
    wrong = line.rpartition("=")[2].rpartition(",")[2]
    with pytest.raises(UserError, match=f"'{wrong}' is not a whole number above 0"):
        command.main(["bench", *line.split()])


# Contenders.


def test_a_network_takes_nothing_from_a_config_of_another():
    # Its overrides have a field that a VGG lacks.
    config = own_programs.short_config("configs/r50.py", "vgg19_bn", 96, 8, "float32")
    config.model.bn_group_size = "global"
    assert set_up(config).model.spec.num_classes == 1000


@pytest.mark.parametrize(("model", "size"), [("resnet50", 96), ("cifar_resnet20", 32)])
def test_a_step_is_of_the_whole_network_as_the_peers_is(model, size):
    setup = set_up(own_programs._step_config(model, size, 8, "float32"))
    assert count(setup.state_like().params) == get_entry(model).params


def test_what_a_contender_lacks_is_told(tmp_path):
    case = ("inference", "torch eager, channels_last", "resnet18", 32, 1, "float32")
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError('No module', name='torch')\n"
    )
    path = f"{tmp_path}:{pathlib.Path(table.__file__).parents[2]}"
    with pytest.raises(LeftOutError, match=r"^torch is not installed$"):
        Child(sys.executable, *case, PYTHONPATH=path).ask("warm")
    with pytest.raises(LeftOutError, match="no-python: No such file"):
        Child(str(tmp_path / "no-python"), *case).ask("warm")
    with pytest.raises(LeftOutError, match="it ended with exit code 1"):
        Child("/bin/false", *case).ask("warm")


def test_a_contender_may_lack_jax():
    code = "import resnet_jax.bench.step, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_short_calls_are_timed_together():
    made = []
    seconds = step._timed(lambda: made.append(time.sleep(0.01)), 1, 0.05)
    # At most five fit, and sleeping may take longer.
    assert 2 <= len(made) <= 5 or seconds > 0.025
    assert seconds >= 0.01
    made.clear()
    step._timed(lambda: made.append(0), 2, 0.0)
    assert len(made) == 2


SMALL = ("--model=cifar_resnet20", "--image_size=16", "--batch_size=4")
SMALL = (*SMALL, "--dtype=float32")


@pytest.mark.slow
def test_the_step_is_measured_traced_and_what_has_no_peer_is_told(
    monkeypatch, capfd, tmp_path
):
    # A process of its own, without the eight devices of the tests.
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    trace = tmp_path / "trace"
    (found,) = measure(
        tmp_path,
        *("step", *SMALL, "--repeats=2", f"--profile={trace}", "--torch=/bin/false"),
    )
    peers = [row["peer"] for row in found["rows"]]
    assert peers == ["stock Linen", "torch eager, channels_last"]
    for row in found["rows"]:
        assert row["value"] > 0 and row["repeats"] == 2
        # Stock Linen has the bottleneck networks only.
        assert row["peer_value"] is None and row["left_out"]
    assert list(trace.rglob("*.xplane.pb"))
    told = capfd.readouterr().err
    costs = re.findall(r"^ +(\d+\.\d+) ms  (\S+)$", told, re.MULTILINE)
    assert len(costs) == 10
    assert len({name for _, name in costs}) == 10
    seconds = [float(cost) for cost, _ in costs]
    assert seconds == sorted(seconds, reverse=True)
    # The newest trace of the folder is the one that is told.
    again = profiler_trace.costliest(trace)
    assert [name for name, _ in again] == [name for _, name in costs]


@pytest.mark.long
def test_compiling_is_measured_fresh_and_from_the_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_NUM_CPU_DEVICES")
    # What the tests compile with is so fast that jax would not keep it.
    monkeypatch.delenv("XLA_FLAGS")
    (found,) = measure(tmp_path, "compile", *SMALL, "--repeats=1")
    fresh, cached, answer = found["rows"]
    assert fresh["name"].endswith("fresh") and cached["name"].endswith("the cache")
    # The second process compiles nothing, but traces as the first one does.
    assert 0 < cached["value"] < fresh["value"]
    assert "stock Linen has no" in fresh["left_out"]
    assert "main --help" in answer["name"]
    assert answer["value"] > 0 and answer["peer_value"] > 0


@pytest.mark.long
def test_the_whole_program_is_held_against_its_bare_step(tmp_path):
    size = ("--image_size=16", "--batch_size=16", "--steps=8")
    (found,) = measure(tmp_path, "overhead", *size, "--repeats=1")
    (row,) = found["rows"]
    assert row["peer"] == "bare compiled step"
    assert row["ratio"] == row["value"] / row["peer_value"] > 0


@pytest.fixture
def jpegs(tmp_path) -> pathlib.Path:
    for index in range(8):
        picture = encode(noise(index, 300, 260), "JPEG")
        (tmp_path / f"{index}.jpg").write_bytes(picture)
    return tmp_path


@pytest.mark.slow
def test_the_input_benchmark_gives_a_row_a_measurement(jpegs, monkeypatch, tmp_path):
    who = ("ours", "bare", "ours eval", "small", "fast pixels")
    monkeypatch.setattr(
        input_bench,
        "MEASUREMENTS",
        [
            (name, one, peer if peer in who else "", what)
            for name, one, peer, what in input_bench.MEASUREMENTS
            if one in who
        ],
    )
    arguments = ["--cores=1", "--batches=4", "--repeats=1", f"--images={jpegs}"]
    (found,) = measure(tmp_path, "input", *arguments)
    assert len(found["rows"]) == len(input_bench.MEASUREMENTS)
    for row in found["rows"]:
        assert tuple(row) == KEYS
        assert row["value"] > 0
        if row["peer"]:
            assert row["ratio"] == row["value"] / row["peer_value"]


def test_of_the_input_benchmark_no_row_is_left_out_for_a_failure(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no JPEG")
    with pytest.raises(UserError, match="ours on originals: it ended with exit code 1"):
        input_bench._run("ours", "originals", tmp_path, 1, 1)


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
    message = f"{name}: cannot be decoded: not an image in a known format. Mend or"
    with pytest.raises(UserError, match=re.escape(message)):
        measure(tmp_path, "input", f"--images={images}")
    assert not capsys.readouterr().out


def test_photographs_are_at_hand_for_the_input_benchmark():
    found = input_bench.read_jpegs(input_bench.SAMPLE)
    assert len(found) == 2
    assert all(content.startswith(b"\xff\xd8") for content in found.values())


@pytest.mark.slow
def test_workers_are_counted_and_their_memory_is_constant(jpegs, monkeypatch):
    monkeypatch.setattr(input_bench, "BATCH", 8)
    found = input_bench._memory(list(input_bench.read_jpegs(jpegs).values()))
    assert len(found) == 50
    # This process alone takes more than its imports; two workers import the same.
    assert found[-1] - found[9] < 100


def test_every_form_of_a_networks_convolutions_is_measured(tmp_path):
    small = ["--model=cifar_resnet20", "--image_size=8", "--batch_size=2"]
    (found,) = measure(
        tmp_path, "convolutions", *small, "--repeats=1", "--dtype=float32"
    )
    # The stem, stages' own and the two strided ones; each in three directions.
    shapes = convolutions.shapes_of("cifar_resnet20", 8)
    assert sorted(shapes.values()) == [1, 1, 1, 5, 5, 6]
    assert len(found["rows"]) == 3 * len(shapes)
