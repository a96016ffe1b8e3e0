"""Paths, folders, patterns and lists of paths become the paths of images."""

import io
import os
import pathlib

import pytest

from resnet_jax.data.given_images import GivenImages, listed_paths
from resnet_jax.errors import UserError
from tests.helpers.pictures import encode, noise, write_folder


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> pathlib.Path:
    """Writes images with difficult names, and makes their folder the working one."""
    image = encode(noise(0, 4, 4), "PNG")
    names = ("a b/x.png", "a b/in/y.JPG", "a b/in/z", "p[1]/x.png", "p1/x.png")
    names = (*names, "b[1].png", "b1.png", "c*.png", "c2.png")
    write_folder(tmp_path, dict.fromkeys(names, image) | {"a b/notes.txt": b"text"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("location", "paths"),
    [
        ("a b", ["a b/x.png", "a b/in/y.JPG", "a b/in/z"]),
        ("a*/*.png", ["a b/x.png"]),
        ("a*/**/*.JPG", ["a b/in/y.JPG"]),
        # Folders and files that a pattern matches are each taken once.
        ("a*/**", ["a b/x.png", "a b/in/y.JPG", "a b/in/z"]),
        ("a*/*", ["a b/in/y.JPG", "a b/in/z", "a b/x.png"]),
        # Real names are not patterns, but unknown ones are.
        ("b[1].png", ["b[1].png"]),
        ("b[12].png", ["b1.png"]),
        ("c*.png", ["c*.png"]),
        ("p[1]/*.png", ["p[1]/x.png"]),
        ("p[12]/*.png", ["p1/x.png"]),
        ("gone.png", ["gone.png"]),
        ("gs://bucket/*.png", ["gs://bucket/*.png"]),
    ],
)
def test_a_location_stands_for_these_images_in_this_order(location, paths):
    if location.startswith("gs://"):
        pytest.importorskip("gcsfs")
    given = GivenImages([location])
    assert list(given) == paths
    assert given.total == len(paths)


def test_a_pattern_that_no_image_matches_is_an_error_that_says_what_was_found():
    for location in ("gone*.png", "a b/*.txt"):
        (error,) = GivenImages([location])
        assert isinstance(error, UserError)
        assert f"No image matches the pattern {location}" in str(error)
    assert "(1 file is left out (.txt: 1))" in str(error)


def test_a_pattern_finds_files_below_the_home_directory(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert list(GivenImages(["~/b?.png"])) == [f"{folder}/b1.png"]


def test_the_total_is_known_once_the_last_location_is_looked_up():
    given = GivenImages(["a b", "gone.png", "a b"])
    assert given.total is None
    paths = iter(given)
    assert [next(paths) for _ in range(4)][-1] == "gone.png"
    assert given.total is None
    next(paths)
    assert given.total == 7
    assert GivenImages(["b1.png", "c2.png"]).total == 2


def test_a_folder_that_is_removed_before_it_is_reached_is_one_error(folder):
    paths = iter(GivenImages(["b1.png", "p1", "c2.png"]))
    assert next(paths) == "b1.png"
    os.rename("p1", folder / "moved")
    # What no longer exists is taken for a file, whose reading fails.
    assert list(paths) == ["p1", "c2.png"]


def test_standard_input_is_read_once():
    with pytest.raises(UserError, match="only once"):
        GivenImages(["-", "b1.png", "-"])


@pytest.mark.parametrize(
    ("content", "paths"),
    [
        (b"a b.png\nc.png\n", ["a b.png", "c.png"]),
        (b"a.png\nc.png", ["a.png", "c.png"]),
        (b"a.png\r\n\r\n  \r\n\nc.png\r\n", ["a.png", "c.png"]),
        (b"\xef\xbb\xbfa.png\r\n", ["a.png"]),
        (b"a\nb.png\0 c.png\0\0\r\0", ["a\nb.png", " c.png", "\r"]),
        (b"\xff\xc3.png\n", [os.fsdecode(b"\xff\xc3.png")]),
        (b"", []),
        (b"\n\n", []),
    ],
)
@pytest.mark.parametrize("part", [1, 2**16])
def test_a_list_of_paths_may_end_its_lines_in_these_ways(content, paths, part):
    class Slow(io.BytesIO):
        def read1(self, size=-1):
            return super().read1(min(size, part))

    # Null bytes are noticed in the first part with an end of a path, and the mark of
    # UTF-8 in the first part.
    if part == 1 and (b"\nb" in content or b"\xef" in content):
        pytest.skip("the first part is too short")
    assert list(listed_paths(Slow(content))) == paths


def test_a_carriage_return_belongs_to_a_name_if_there_is_such_a_file(folder):
    (folder / "d\r").touch()
    assert list(listed_paths(io.BytesIO(b"d\r\ne\r\n"))) == ["d\r", "e"]


def test_an_image_instead_of_a_list_is_an_error():
    stream = io.BytesIO(encode(noise(0, 4, 4), "JPEG"))
    with pytest.raises(UserError, match="Standard input is an image"):
        list(listed_paths(stream))
