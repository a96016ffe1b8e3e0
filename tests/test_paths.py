"""Paths that a user wrote: what is expanded, and what is refused before any work."""

import os
import pathlib
import re

import pytest

from resnet_jax import paths
from resnet_jax.errors import UserError
from resnet_jax.persistence import storage

# What the system refuses, whatever a path is used for.
IMPOSSIBLE = {
    "": "A path is empty; is a variable unset?",
    " ": "A path is empty",
    "a\0b": r"a\x00b cannot be used: embedded null byte",
    "n" * 300: "cannot be used: File name too long",
    "/".join(["n" * 200] * 30): "cannot be used: File name too long",
    "loop/x": "loop/x cannot be used: Too many levels of symbolic links",
    "file/x": "file/x cannot be used: Not a directory",
    "~no_such_user/x": "home directory ~no_such_user is not known",
    "ftp://host/x": "ftp://host/x is an address",
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Creates files to refuse in the working directory, and an empty home."""
    (tmp_path / "home").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("no_such_file")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("function", [paths.local, paths.file_to_write])
@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_an_impossible_path_is_one_short_sentence(text, function):
    with pytest.raises(UserError, match=re.escape(IMPOSSIBLE[text])) as error:
        function(text)
    assert len(str(error.value)) < 350
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "new",
        "a/b",
        "../x",
        "a b",
        "a\nb",
        "é✓",
        "a\udce9b",
        "folder/",
        "a://b",
        "./gs:",
    ],
)
def test_other_paths_are_taken_as_they_are(text):
    # The name before a scheme has no such characters.
    text = f"./{text}" if "://" in text else text
    assert paths.local(text) == storage.path_of(text) == pathlib.Path(text)


@pytest.mark.parametrize(
    "function", [paths.local, storage.path_of, paths.file_to_write]
)
def test_a_tilde_is_the_home_directory(function, place):
    assert function("~/x") == place / "home" / "x"
    assert not (place / "~").exists()
    assert paths.local("~root") == pathlib.Path(os.path.expanduser("~root"))


def test_a_file_whose_name_begins_with_a_tilde_is_found(place):
    (place / "~draft.png").touch()
    assert paths.local("~draft.png") == pathlib.Path("~draft.png")
    assert paths.local("./~other") == pathlib.Path("./~other")


def test_without_a_home_directory_a_tilde_is_refused(monkeypatch):
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(UserError, match=r"home directory ~ is not known.*\./~/x"):
        paths.local("~/x")


@pytest.mark.parametrize("text", ["gs:/bucket/x", "s3:bucket/x", "gs:"])
def test_an_address_that_lost_a_slash_is_not_a_local_path(text):
    for function in (
        storage.path_of,
        storage.file_to_write,
        lambda text: storage.local_path_of(text, "It"),
    ):
        with pytest.raises(UserError, match=r"write (gs|s3)://"):
            function(text)


def test_a_device_is_written_to_but_not_read(place):
    """Reading /dev/zero never ends."""
    with pytest.raises(UserError, match="/dev/zero is a device"):
        storage.path_of("/dev/zero")
    (place / "sink").symlink_to("/dev/null")
    storage.write(storage.file_to_write("sink"), "lost")
    assert (place / "sink").is_symlink()
    assert not (place / "sink").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("home", "home is a directory; add the name of the file"),
        ("new/", "new/ is a directory; add the name of the file"),
        ("no/such/x", "there is no directory no/such"),
        ("/proc/x", "/proc/x cannot be written: "),
        ("/sys/x", "/sys/x cannot be written: "),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_at_once(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        storage.file_to_write(text)


def test_the_check_of_a_file_leaves_nothing_and_changes_nothing(place):
    before = sorted(place.rglob("*"))
    assert paths.file_to_write("file") == pathlib.Path("file")
    assert paths.file_to_write("new.png") == pathlib.Path("new.png")
    paths.check_folder_to_write(pathlib.Path("a/b/c"))
    assert (place / "file").read_text() == "mine"
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file", "file cannot be a directory, since file exists and is not one"),
        ("nowhere", "nowhere cannot be a directory, since nowhere is a broken link"),
        ("nowhere/x", "nowhere/x cannot be a directory"),
        ("a\udce9b", r"a\udce9b is not UTF-8"),
        ("/proc/x", "/proc/x cannot be written"),
        ("/sys/x/y", "/sys/x/y cannot be written"),
    ],
)
def test_a_directory_that_cannot_be_created_is_refused_at_once(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        paths.check_folder_to_write(pathlib.Path(text))
