"""The quickstart shows a new user its accuracy, its files and its progress."""

import contextlib
import doctest
import json
import os
import pty
import re
import termios

import pytest

from tests.helpers import pages, runs

# The last lines of `make demo`.
FRONT_PAGE = pages.fences("README.md", "text")[0].text.splitlines()
MAKEFILE = (runs.ROOT / "Makefile").read_text()

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Returns the workdir and the output of the first run of README."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    code, output = runs.run(workdir, "--config=configs/quickstart.py")
    assert code == 0, output
    return workdir, output


def test_the_quickstart_reaches_98_percent(quickstart):
    result = runs.result(quickstart[0])
    assert result["top1"] >= 0.98
    assert result["n_seen"] == 360


def test_the_front_page_shows_how_make_demo_ends(quickstart):
    # Figures depend on the machine.
    hidden = [
        re.sub(r"\d+\.\d+", "...", line)
        for line in (quickstart[1].splitlines()[-1], FRONT_PAGE[0])
    ]
    matches = doctest.OutputChecker().check_output
    assert matches(hidden[1], hidden[0], doctest.ELLIPSIS), hidden
    assert FRONT_PAGE[1] == "The report of the run: runs/quickstart/report.png"
    assert 'echo "The report of the run: $(DEMO)/report.png"' in MAKEFILE


@pytest.mark.long
def test_the_quickstart_trains_for_at_most_90_seconds(quickstart):
    assert runs.result(quickstart[0])["seconds"] <= 90


def test_the_result_names_the_network_the_step_and_the_command(quickstart):
    workdir, output = quickstart
    result = runs.result(workdir)
    assert result["params"] == 269_434
    assert result["step"] == 674
    assert result["images_per_second"] > 0
    assert {"top5", "loss", "command", "versions"} <= result.keys()
    last = output.splitlines()[-1]
    assert f"top-1 {100 * result['top1']:.2f} %" in last
    assert last.endswith(result["command"])


def test_the_summary_describes_devices_network_batches_and_steps(quickstart):
    head = quickstart[1].split("step ")[0]
    for fact in (
        "1 x cpu",
        "cifar_resnet20, 269,434 parameters",
        "2.5 M MACs",
        "64 images, 64 a device",
        "ghost batches of 32 images, 2 a batch",
        "674 (30.02 epochs)",
    ):
        assert fact in head


def test_the_output_is_what_the_page_shows(quickstart):
    workdir, output = quickstart
    page = (runs.ROOT / "docs" / "getting_started.md").read_text()
    (shown,) = re.findall("```text\n(devices:.*?)```", page, re.DOTALL)
    shown = shown.replace("runs/quickstart", str(workdir))
    # Three dots stand for what varies, which may be several lines.
    pattern = re.escape(shown).replace(re.escape("..."), ".*?")
    assert re.fullmatch(pattern, output, re.DOTALL), output


def test_the_workdir_holds_curves_tensorboard_and_the_picture(quickstart):
    workdir = quickstart[0]
    rows = [json.loads(r) for r in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert any("train/loss" in row for row in rows)
    assert rows[-1]["eval/n_seen"] == 360
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert (workdir / "report.png").stat().st_size > 10_000


def test_lines_show_eta_speed_and_waiting_without_a_terminal(quickstart):
    lines = [
        x for x in quickstart[1].splitlines() if re.match(r"step \d+/674  epoch", x)
    ]
    assert len(lines) >= 20
    for line in lines:
        assert re.search(r"images/s \d+  waiting \d+%  .*ETA \d\d:\d\d$", line), line


def _read_to_the_end(terminal: int) -> str:
    # One read gives at most 4 KiB, and at the end of a terminal Linux raises EIO.
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
    for figure in ("loss=", "images/s=", "waiting=", "step/s"):
        assert figure in bar


def test_a_finished_run_prints_its_result_again_without_training(quickstart):
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
