"""Files on a file system: whole after any failure, and nothing damaged is lost."""

import errno
import json
import math
import os
import pathlib
import re
import shutil

import pytest

from resnet_jax.errors import UserError
from resnet_jax.persistence import storage
from tests import fault_drill
from tests.helpers.checkpoints import open_for_writing, progress_at, random_state
from tests.helpers.system_calls import syncs_and_renames

OBJECT = {"top1": 0.5}


def damage_empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def damage_cut(path: pathlib.Path) -> None:
    path.write_bytes(b'{"top1": 0.')


def damage_zeros(path: pathlib.Path) -> None:
    path.write_bytes(bytes(64))


def damage_bytes(path: pathlib.Path) -> None:
    path.write_bytes(bytes(range(256)))


def damage_list(path: pathlib.Path) -> None:
    path.write_bytes(b"[]")


def damage_text(path: pathlib.Path) -> None:
    path.write_bytes(b'"x"')


def damage_depth(path: pathlib.Path) -> None:
    path.write_bytes(b"[" * 10**5)


def damage_directory(path: pathlib.Path) -> None:
    path.mkdir()


def damage_pipe(path: pathlib.Path) -> None:
    os.mkfifo(path)


def damage_link(path: pathlib.Path) -> None:
    path.symlink_to(path)


DAMAGES = [value for name, value in globals().items() if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_json_is_set_aside_and_made_again(tmp_path, capsys, damage):
    path = tmp_path / "config.json"
    for number in (1, 2):
        path.unlink(missing_ok=True)
        damage(path)
        with pytest.raises(UserError, match=re.escape(str(path))):
            storage.read_object(path)
        storage.write_by_product(path, OBJECT)
        assert storage.read_object(path) == OBJECT
        (warning,) = capsys.readouterr().err.splitlines()
        assert f"renamed to config.json.damaged-{number}" in warning
    assert len(list(tmp_path.iterdir())) == 3
    storage.write_by_product(path, {"top1": 0.7})
    assert not capsys.readouterr().err


@pytest.mark.parametrize("damage", [damage_directory, damage_pipe, damage_link])
def test_what_is_in_the_way_of_a_picture_is_set_aside(tmp_path, capsys, damage):
    path = tmp_path / "report.png"
    damage(path)
    storage.write_by_product(path, b"a picture")
    assert path.read_bytes() == b"a picture"
    assert "report.png.damaged-1" in capsys.readouterr().err
    assert os.path.lexists(tmp_path / "report.png.damaged-1")


def test_a_missing_file_is_not_a_damaged_one(tmp_path, capsys):
    with pytest.raises(FileNotFoundError):
        storage.read_object(tmp_path / "result.json")
    storage.write_by_product(tmp_path / "result.json", OBJECT)
    storage.write_by_product(tmp_path / "report.png", b"a picture")
    assert not capsys.readouterr().err


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_becomes_null(tmp_path, value):
    path = tmp_path / "result.json"
    storage.write_json(path, {"loss": value, "sets": [{"a": (value, 1.5)}]})

    def refuse(name):
        raise AssertionError(name)

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content == {"loss": None, "sets": [{"a": [None, 1.5]}]}
    # Older versions wrote the names that Python has for them.
    path.write_text(json.dumps({"loss": value}))
    assert str(storage.read_object(path)["loss"]) == str(value)


def test_a_full_disk_leaves_the_old_file_whole(tmp_path):
    with fault_drill.small_disk(tmp_path) as disk:
        if disk is None:
            pytest.skip("mounting a small disk needs root")
        path = disk / "config.json"
        storage.write(path, "old")
        size = shutil.disk_usage(disk).free
        with pytest.raises(OSError) as raised:
            storage.write(path, bytes(size + 2**20))
        assert raised.value.errno == errno.ENOSPC
        assert path.read_text() == "old"
        assert [file.name for file in disk.iterdir()] == ["config.json"]
        with pytest.raises(OSError):
            storage.GrowingFile(path, bytes(size + 2**20))
        assert path.read_text() == "old"


@pytest.mark.parametrize("length", [1, 200, 255])
def test_a_file_is_written_under_every_name_that_the_file_system_takes(
    tmp_path, length
):
    storage.write(tmp_path / ("x" * length), "content")
    assert [len(file.name) for file in tmp_path.iterdir()] == [length]


def test_a_leftover_of_a_killed_process_is_not_in_the_way(tmp_path):
    (tmp_path / "config.json.partial").mkdir()
    storage.write(tmp_path / "config.json", "content")
    assert (tmp_path / "config.json").read_text() == "content"


@pytest.mark.slow
def test_a_file_and_its_name_are_on_disk_before_the_writer_goes_on(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    program = f"""
import pathlib
from resnet_jax.persistence import storage
folder = pathlib.Path({str(folder)!r})
storage.write_json(folder / "config.json", {{}})
file = storage.GrowingFile(folder / "metrics.jsonl")
file.add("row")
file.flush()
"""
    calls = syncs_and_renames(program, folder)
    names = [re.sub(r"^\..*\.partial$", "partial", name) for _, name in calls]
    assert list(zip((call for call, _ in calls), names, strict=True)) == [
        ("sync", "partial"),
        ("rename", "config.json"),
        ("sync", ""),
        ("sync", "partial"),
        ("rename", "metrics.jsonl"),
        ("sync", ""),
        ("sync", "metrics.jsonl"),
    ]


def test_an_error_of_the_file_system_is_a_sentence_with_the_path_and_advice(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, advice in (
        (tmp_path / "file" / "config.json", "Move away what is at this path"),
        (tmp_path / "folder", "Move away what is at this path"),
        (tmp_path / "loop" / "config.json", "Move away what is at this path"),
        (tmp_path / ("x" * 256), "Choose a shorter name"),
    ):
        with (
            pytest.raises(UserError, match=advice),
            storage.explaining_errors(path),
        ):
            path.write_text("content")
    # An unexpected error keeps its type.
    with pytest.raises(ZeroDivisionError), storage.explaining_errors(tmp_path):
        raise ZeroDivisionError


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/3/metrics"])
def test_a_file_in_the_way_of_checkpoints_is_one_sentence(tmp_path, name):
    with open_for_writing(tmp_path / "checkpoints") as saved:
        saved.save(random_state(3), progress_at(3, 0.5))
        saved.wait()
    shutil.rmtree(tmp_path / name)
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match="Move away what is at this path"):
        open_for_writing(tmp_path / "checkpoints")
