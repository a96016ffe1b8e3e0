"""Metrics of a run: rows that were cut off or come after a checkpoint are dropped."""

import contextlib
import gc
import json
import math
import os
import struct

import pytest
from tensorboardX import RecordWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from resnet_jax.errors import UserError
from resnet_jax.persistence.metric_writers import (
    Writer,
    describe,
    points,
    read_metrics,
)
from resnet_jax.persistence.storage import write_json
from tests import fault_drill
from tests.helpers.checkpoints import TRAIN_METRICS


def write(workdir, *, step: int, rows: tuple[int, ...]) -> None:
    with Writer(workdir, step=step, total_steps=9, active=True) as writer:
        for row in rows:
            writer.train(row, TRAIN_METRICS, eta=1.0)


def test_rows_after_the_checkpoint_are_dropped_when_a_run_resumes(tmp_path):
    write(tmp_path, step=0, rows=(1, 2, 3, 4))
    write(tmp_path, step=2, rows=(3,))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_row_that_was_cut_off_is_ignored(tmp_path):
    write(tmp_path, step=0, rows=(1, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_named_pipe_in_place_of_the_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    write(tmp_path, step=0, rows=(1,))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_processes_other_than_the_lead_process_write_nothing(tmp_path, capsys):
    with Writer(tmp_path, step=0, total_steps=9, active=False) as writer:
        writer.train(1, TRAIN_METRICS, eta=1.0)
        writer.evaluation(1, {"top1": 1.0, "top5": 1.0, "loss": 0.0, "n_seen": 3})
        writer.tick(1)
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().out


def test_a_json_file_is_replaced_at_once(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.parametrize("taken", ["metrics.jsonl", "tensorboard"])
def test_what_is_in_the_way_is_set_aside_with_one_warning(tmp_path, capsys, taken):
    if taken == "metrics.jsonl":
        (tmp_path / taken).mkdir()
    else:
        (tmp_path / taken).write_text("another file")
    write(tmp_path, step=0, rows=(1, 2))
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {tmp_path / taken} is ")
    assert f"It was renamed to {taken}.damaged-1" in warning
    assert (tmp_path / f"{taken}.damaged-1").exists()
    assert list((tmp_path / "tensorboard").iterdir())
    assert len(read_metrics(tmp_path)) == 2


ROW = b'{"step": 1, "train/loss": 1.0}\n'
DAMAGES = {
    "bytes that are not UTF-8": ROW + b"\xff\xfe\n" + ROW.replace(b"1,", b"2,"),
    "a line that is cut": ROW + ROW[:9] + b"\n" + ROW.replace(b"1,", b"2,"),
    "zeros at the end": ROW + ROW.replace(b"1,", b"2,") + bytes(100),
    "zeros in the middle": ROW + bytes(100) + b"\n" + ROW.replace(b"1,", b"2,"),
    "a line that is no object": ROW + b"[1]\n" + ROW.replace(b"1,", b"2,"),
    "a line without a step": ROW + b"{}\n" + ROW.replace(b"1,", b"2,"),
    "a step that is no number": ROW + b'{"step": "3"}\n' + ROW.replace(b"1,", b"2,"),
    "a line of brackets": ROW + b"[" * 10**5 + b"\n" + ROW.replace(b"1,", b"2,"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_lines_are_set_aside_and_the_others_kept(tmp_path, capsys, damage):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(DAMAGES[damage])
    # A command that only reads changes nothing.
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert path.read_bytes() == DAMAGES[damage]
    assert "1 of 3 lines of" in capsys.readouterr().err
    write(tmp_path, step=2, rows=(3,))
    (warning,) = capsys.readouterr().err.splitlines()
    assert "1 of 3 lines of" in warning and "metrics.jsonl.damaged-1" in warning
    assert (tmp_path / "metrics.jsonl.damaged-1").read_bytes() == DAMAGES[damage]
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert not capsys.readouterr().err


@pytest.mark.parametrize("content", [bytes(50), b"[]", b"{}", b"\xff", b"null\n"])
def test_a_file_without_any_intact_line_is_reported(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"1 of 1 lines of .* are damaged"):
        read_metrics(tmp_path)


def test_figures_that_are_not_finite_are_valid_json_and_read_again(tmp_path):
    values = {"top1": 0.5, "top5": 1.0, "loss": math.inf, "n_seen": 8}
    with Writer(tmp_path, step=0, total_steps=9, active=True) as writer:
        writer.evaluation(1, values)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(name):
        raise AssertionError(name)

    assert json.loads(line, parse_constant=refuse)["eval/loss"] is None
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["eval/loss"])
    # Older versions wrote names that JSON does not have.
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "eval/loss": Infinity}\n')
    (row,) = read_metrics(tmp_path)
    assert points([row], "eval/loss") == [(1, math.inf)]
    assert "loss nan" in describe({**values, "loss": None})


@pytest.mark.parametrize(
    "bad",
    [{"bad_images": 1200}, {"bad_images": ["x"] * 1200}, {"bad_eval_images": 1200}],
)
def test_images_that_were_skipped_in_an_evaluation_are_counted(bad):
    values = {"top1": 0.5, "top5": 1.0, "loss": 1.0, "n_seen": 18}
    assert describe(values | bad).endswith("  on 18 images (1,200 skipped)")
    assert describe(values | dict.fromkeys(bad, 0)).endswith("  on 18 images")


def test_a_full_disk_ends_the_files_with_one_warning_each(tmp_path, capfd):
    with fault_drill.small_disk(tmp_path) as disk:
        if disk is None:
            pytest.skip("mounting a small disk needs root")
        with Writer(disk, step=0, total_steps=9, active=True) as writer:
            writer.train(1, TRAIN_METRICS, eta=1.0)
            with (disk / "filler").open("wb") as file, contextlib.suppress(OSError):
                while file.write(bytes(2**16)):
                    file.flush()
            for step in range(2, 300):
                writer.train(step, TRAIN_METRICS, eta=1.0)
        gc.collect()
        warnings = capfd.readouterr().err.splitlines()
        assert [line.split()[1] for line in sorted(warnings)] == [
            str(disk / "metrics.jsonl"),
            str(disk / "tensorboard"),
        ]
        assert all("No space left on device" in line for line in warnings)
        (disk / "filler").unlink()
        # The row that was cut off is dropped, and the resumed run appends to the rest.
        rows = len(read_metrics(disk))
        assert 0 < rows < 299
        write(disk, step=rows, rows=(rows + 1,))
        steps = [row["step"] for row in read_metrics(disk)]
        assert steps == list(range(1, rows + 2))
    assert not capfd.readouterr().err


def test_events_are_written_in_the_format_of_tensorboard(tmp_path):
    """The file equals the one that tensorboardX writes from the same events."""
    write(tmp_path, step=3, rows=(4,))
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, ours = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        ours.append(content[12 : 12 + length])
        content = content[16 + length :]
    (tmp_path / "expected").mkdir()
    writer = RecordWriter(str(tmp_path / "expected" / "events"))
    for event in ours:
        writer.write(event)
    writer.close()
    assert (tmp_path / "expected" / "events").read_bytes() == path.read_bytes()
    events = [Event.FromString(event) for event in ours]
    assert events[0].file_version == "brain.Event:2"
    # Events of an earlier process after the step of the restart are discarded.
    assert (events[1].step, events[1].session_log.status) == (4, SessionLog.START)
    values = {
        e.summary.value[0].tag: e.summary.value[0].simple_value for e in events[2:]
    }
    assert values["train/loss"] == 1.0
