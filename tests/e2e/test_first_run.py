"""What a new user sees: the quickstart, its files, its accuracy."""

import contextlib
import json
import os
import pty
import re
import termios

import pytest

from tests.helpers import runs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Workdir and output of README's first run."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    code, output = runs.run(workdir, "--config=configs/quickstart.py")
    assert code == 0, output
    return workdir, output


def test_the_quickstart_reaches_98_percent_in_90_seconds(quickstart):
    result = runs.result(quickstart[0])
    assert result["top1"] >= 0.98
    assert result["n_seen"] == 360
    assert result["seconds"] <= 90


def test_the_result_says_what_it_is_of(quickstart):
    workdir, output = quickstart
    result = runs.result(workdir)
    assert result["params"] == 269_434
    assert result["step"] == 674
    assert result["images_per_second"] > 0
    assert {"top5", "loss", "command", "versions"} <= result.keys()
    last = output.splitlines()[-1]
    assert f"top-1 {100 * result['top1']:.2f} %" in last
    assert last.endswith(result["command"])


def test_the_summary_tells_what_will_be_done(quickstart):
    head = quickstart[1].split("step ")[0]
    for told in (
        "1 x cpu",
        "cifar_resnet20, 269,434 parameters",
        "2.5 M MACs",
        "64 images, 64 a device",
        "ghost batches of 32 images, 2 a batch",
        "674 (30.02 epochs)",
    ):
        assert told in head


def test_the_workdir_holds_curves_tensorboard_and_the_picture(quickstart):
    workdir = quickstart[0]
    rows = [json.loads(r) for r in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert any("train/loss" in row for row in rows)
    assert rows[-1]["eval/n_seen"] == 360
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert (workdir / "report.png").stat().st_size > 10_000


def test_lines_tell_eta_speed_and_waiting_where_there_is_no_terminal(quickstart):
    lines = [
        x for x in quickstart[1].splitlines() if re.match(r"step \d+/674  epoch", x)
    ]
    assert len(lines) >= 20
    for line in lines:
        assert re.search(r"images/s \d+  waiting \d+%  .*ETA \d\d:\d\d$", line), line


def _read_to_the_end(terminal: int) -> str:
    # One read gives 4 KiB at most; Linux tells the end of a terminal as an EIO.
    parts = []
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 4096):
            parts.append(part)
    return b"".join(parts).decode()


def test_a_terminal_gets_a_progress_bar(tmp_path):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 160))
    flags = ("--config.total.steps=12", "--config.optim.warmup.steps=0")
    process = runs.start(
        tmp_path / "run", "--config=configs/quickstart.py", *flags, stderr=theirs
    )
    os.close(theirs)
    bar = _read_to_the_end(ours)
    code, _ = runs.finish(process)
    assert code == 0, bar
    assert "12/12" in bar
    for told in ("loss=", "images/s=", "waiting=", "step/s"):
        assert told in bar


def test_the_finished_run_is_told_again_and_not_trained_again(quickstart):
    workdir, first = quickstart
    code, output = runs.run(workdir, "--config=configs/quickstart.py")
    assert code == 0
    assert output.splitlines()[-1] == first.splitlines()[-1]
    assert "resuming from the checkpoint of step 674" in output


def test_the_report_can_be_drawn_again(quickstart):
    workdir = quickstart[0]
    (workdir / "report.png").unlink()
    code, output = runs.run_python("-m", "resnet_jax.report", str(workdir))
    assert code == 0, output
    assert (workdir / "report.png").exists()
