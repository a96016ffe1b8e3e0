"""A failure to print, draw or log neither ends a run nor changes its result."""

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
from PIL import Image

from tests.helpers import runs

pytestmark = pytest.mark.slow

# Names with invalid TeX, with a terminal's escape sequence, with characters beyond
# ASCII, and with a byte that is not UTF-8.
CLASSES = (b"a$b_$", b"\x1b[31mred", "h\u00e9\N{GRINNING FACE}".encode(), b"\xff")


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> tuple[str, ...]:
    """Returns the flags of a small run on a folder of classes with difficult names."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            directory = folder / split / os.fsdecode(name)
            directory.mkdir(parents=True)
            for number in range(16):
                pixels = rng.integers(256, size=(8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(directory / f"{number}.png")
    return (*runs.SMALL, f"--config.data.source=folder:{folder}")


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> pathlib.Path:
    """Returns the workdir of a finished run whose output was limited to ASCII."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = runs.run(workdir, *flags, PYTHONIOENCODING="ascii")
    assert code == 0, output
    assert "\x1b" not in output and "warning" not in output, output
    assert "Glyph" not in output
    assert f"report: {workdir / 'report.png'}" in output.splitlines()
    return workdir


def assert_trained(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
    assert (workdir / "report.png").exists()
    runs.assert_same_end(workdir, undisturbed)


def test_a_run_survives_that_the_reader_of_its_output_closes_it(
    flags, undisturbed, tmp_path
):
    process = runs.start(tmp_path / "run", *flags)
    assert any(line.startswith("step 3/") for line in process.stdout)
    process.stdout.close()
    assert process.wait(300) == 0
    assert_trained(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("redirect", [">&- 2>&-", ">/dev/full 2>/dev/full"])
def test_a_run_trains_although_nothing_can_be_printed(
    flags, undisturbed, tmp_path, redirect
):
    code, _ = runs.run(tmp_path / "run", *flags, redirect=redirect)
    assert code == 0
    assert_trained(tmp_path / "run", undisturbed)


def test_a_run_survives_that_the_terminal_with_its_progress_bar_closes(
    flags, undisturbed, tmp_path
):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 160))
    process = runs.start(tmp_path / "run", *flags, stderr=theirs)
    os.close(theirs)
    shown = b""
    while b"/40 [" not in shown:
        shown += os.read(ours, 4096)
    os.close(ours)
    code, output = runs.finish(process)
    assert code == 0, output
    assert output.count("Standard error cannot be written (Input/output error)") == 1
    assert_trained(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_saves_although_nobody_reads(flags, tmp_path, number):
    """Ctrl-C ends `tee` as well as the run before it."""
    process = runs.start(tmp_path / "run", *flags, "--config.checkpoint.every.steps=40")
    assert any(line.startswith("step 6/") for line in process.stdout)
    process.stdout.close()
    process.send_signal(number)
    assert process.wait(300) == 128 + number
    assert runs.checkpoint_steps(tmp_path / "run")[-1] >= 6


def test_a_run_that_is_stopped_saves_although_its_reader_waits(flags, tmp_path):
    """A pager reads no more than it shows, and training waits for it."""
    total = ("--config.total.steps=400", "--config.checkpoint.every.steps=400")
    process = runs.start(tmp_path / "run", *flags, *total)
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 8192)
    waiting, before = bytearray(4), b""
    # Two pages: the pipe is full when its second page has been started.
    while waiting != before or int.from_bytes(waiting, sys.byteorder) < 4096:
        before = bytes(waiting)
        time.sleep(2)
        fcntl.ioctl(process.stdout, termios.FIONREAD, waiting)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    steps = re.findall(r"^step (\d+)/.*ETA", process.stdout.read(), re.MULTILINE)
    assert runs.checkpoint_steps(tmp_path / "run")[-1] > int(steps[-1])


@pytest.mark.long
def test_a_run_whose_reader_waits_too_long_continues_without_it(flags, tmp_path):
    steps = ("--config.total.steps=400", "--config.checkpoint.every.steps=400")
    stall = "--stall_timeout=10s"
    process = runs.start(tmp_path / "run", *flags, *steps, stall)
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 8192)
    assert process.wait(300) == 0
    assert runs.result(tmp_path / "run")["step"] == 400


def test_a_run_survives_that_its_dispensable_files_cannot_be_written(
    flags, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    process = runs.start(workdir, *flags)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 3/"):
            break
    shutil.rmtree(workdir / "tensorboard")
    in_the_way = ("metrics.jsonl", "predictions.npz", "result.json", "report.png")
    for name in in_the_way:
        with contextlib.suppress(FileNotFoundError):
            (workdir / name).unlink()
        (workdir / name).mkdir()
    code, rest = runs.finish(process)
    output = "".join(lines) + rest
    assert code == 0, output
    # Each evaluation has sample predictions; the picture needs metrics.jsonl.
    warnings = {
        line.split()[1]: line
        for line in output.splitlines()
        if line.startswith(f"warning: {workdir}")
    }
    assert warnings.keys() == {str(workdir / name) for name in in_the_way[1:]}
    assert f"{workdir / 'report.png'} cannot be written" in output
    for name in ("predictions.npz", "result.json"):
        assert f"renamed to {name}.damaged-1" in warnings[str(workdir / name)]
    assert "report: " not in output
    assert output.splitlines()[-1].startswith("result: top-1 ")
    arrays, expected = runs.final_arrays(workdir), runs.final_arrays(undisturbed)
    for name, array in arrays.items():
        assert array.tobytes() == expected[name].tobytes(), name

    # The same command again has nothing to train.
    code, output = runs.run(workdir, *flags)
    assert code == 0, output
    assert "renamed to metrics.jsonl.damaged-1" in output


def test_a_picture_that_cannot_be_drawn_is_one_warning(flags, undisturbed, tmp_path):
    # With this backend matplotlib cannot be imported.
    code, output = runs.run(tmp_path / "run", *flags, MPLBACKEND="nonsense")
    assert code == 0, output
    (warning,) = [line for line in output.splitlines() if "report" in line]
    assert warning.startswith(f"warning: {tmp_path / 'run' / 'report.png'} cannot be ")
    assert "nonsense" in warning
    runs.assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("zoo resnet18", 141),
        ("recipes quickstart*", 141),
        ("keys optim.*", 141),
        ("predict {run} {image} --save={out}.png", 141),
        pytest.param("plan {config} --topology=local", 141, marks=pytest.mark.long),
        ("bench schedule {config} --train_size=100", 141),
        ("prepare verify folder:{data} --num_workers=1", 141),
        # The result of these commands is a file, so they succeed.
        ("prepare folder:{plain} --out={out} --num_workers=1", 0),
        ("convert {run} {out}.npz", 0),
        ("report {run}", 0),
        ("analysis.degradation --runs={run} --save={out}.png", 0),
        pytest.param(
            "analysis.gradients {config} --batches=1 --save={out}.png",
            0,
            marks=pytest.mark.long,
        ),
        pytest.param(
            "main {config} --workdir={run} --mode=eval", 0, marks=pytest.mark.long
        ),
        ("main --help", 141),
    ],
)
def test_each_command_ends_quietly_when_nobody_reads(
    flags, undisturbed, tmp_path, command, code
):
    data = pathlib.Path(flags[-1].partition("folder:")[2])
    plain = tmp_path / "plain"
    # The names of files in a prepared data set are UTF-8.
    shutil.copytree(data / "test" / "a$b_$", plain / "train" / "a$b_$")
    values = {
        "run": str(undisturbed),
        "image": str(next((data / "test").rglob("*.png"))),
        "data": str(data),
        "plain": str(plain),
        "out": str(tmp_path / "out"),
    }
    module, *arguments = command.split()
    filled = []
    for argument in arguments:
        filled += flags if argument == "{config}" else [argument.format(**values)]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", f"resnet_jax.{module}", *filled],
        cwd=runs.ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
    )
    os.close(writer)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    warnings = done.stderr.count("Broken pipe")
    assert warnings == (code == 0), done.stderr


def test_a_launcher_without_a_reader_lets_its_processes_train(
    flags, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    process = runs.start_python(
        *("launch/local.py", "1", f"--workdir={workdir}", *flags)
    )
    assert any("step 3/" in line for line in process.stdout)
    process.stdout.close()
    assert process.wait(300) == 0
    assert_trained(workdir, undisturbed)
