"""Files that are whole whatever happens, and rows that belong to the run."""

import json
import pathlib

import pytest
from tensorboardX import record_writer

from resnet_jax import writers
from resnet_jax.writers import Writer, read_metrics, write_json

VALUES = {
    "loss": 1.0,
    "top1": 0.5,
    "epoch": 0.1,
    "images_per_second": 10.0,
    "data_wait": 0.01,
    "learning_rate": 0.1,
}


def write(workdir, *, step: int, rows: tuple[int, ...]) -> None:
    with Writer(workdir, step=step, total_steps=9, active=True) as writer:
        for row in rows:
            writer.train(row, VALUES, eta=1.0)


def test_rows_behind_the_checkpoint_go_when_a_run_goes_on(tmp_path):
    write(tmp_path, step=0, rows=(1, 2, 3, 4))
    write(tmp_path, step=2, rows=(3,))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_row_that_was_cut_off_is_left_out(tmp_path):
    write(tmp_path, step=0, rows=(1, 2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path, capsys):
    with Writer(tmp_path, step=0, total_steps=9, active=False) as writer:
        writer.train(1, VALUES, eta=1.0)
        writer.evaluation(1, {"top1": 1.0, "top5": 1.0, "loss": 0.0, "n_seen": 3})
        writer.tick(1)
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().out


def test_a_json_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_numbers_for_tensorboard_that_find_no_room_are_told(tmp_path, monkeypatch):
    full = pathlib.Path("/dev/full")
    monkeypatch.setattr(record_writer, "open_file", lambda _: full.open("wb"))
    monkeypatch.setattr(writers, "EVERY", 0.0)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, step=0, rows=range(50))
