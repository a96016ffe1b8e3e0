"""All images of a folder are found, and the other files are counted by kind."""

import os
import pathlib
import socket
import subprocess
import sys
from collections import Counter

import pytest
from PIL import Image

from resnet_jax.data.decode import Picture
from resnet_jax.data.image_files import (
    SUFFIXES,
    describe,
    find_images,
    kind_of_other,
)
from resnet_jax.errors import UserError
from tests.helpers.pictures import encode, noise

PICTURE = noise(0, 12, 10)
JPEG = encode(PICTURE, "JPEG")


def write(root: pathlib.Path, *names: str, content: bytes = JPEG) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# Which files are images.


def test_the_suffixes_are_those_that_pillow_reads_and_heic():
    # Pillow recognises the first five without reading them, and runs Ghostscript for
    # the last one.
    unread = {"BUFR", "GRIB", "HDF5", "WMF", "MPEG", "EPS"}
    read = {
        suffix
        for suffix, kind in Image.registered_extensions().items()
        # The plugin of JPEG opens MPO.
        if (kind in Image.OPEN or kind == "MPO") and kind not in unread
    }
    # Pillow reads these if pillow-heif is installed and was needed before.
    heic = {".heic", ".heics", ".heif", ".heifs", ".hif"}
    assert read | heic <= SUFFIXES
    # Pillow 15 will drop IM.
    assert SUFFIXES - read - heic <= {".im"}


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [
        *((suffix, "RGB") for suffix in (".jpg", ".jpeg", ".jfif", ".jpe", ".mpo")),
        *((suffix, "RGB") for suffix in (".png", ".apng", ".bmp", ".dib", ".gif")),
        *((suffix, "RGB") for suffix in (".webp", ".avif", ".jp2", ".j2k", ".tga")),
        *((suffix, "RGB") for suffix in (".tif", ".tiff", ".ppm", ".pnm", ".pcx")),
        *((suffix, "RGB") for suffix in (".sgi", ".dds", ".ico", ".JPG", ".Gif")),
        *((".pgm", "L"), (".pbm", "1"), (".xbm", "1"), (".msp", "1"), (".pfm", "F")),
    ],
)
def test_images_of_many_formats_are_found_and_decoded(suffix, mode, tmp_path):
    path = tmp_path / f"1{suffix}"
    PICTURE.convert(mode).save(path, format=None)
    assert find_images(tmp_path).paths == [path.name]
    assert Picture(path.read_bytes(), 3).size == (12, 10)


@pytest.mark.parametrize(
    "name",
    [
        *("photo", "x.jpg?resize=800", "x.jpg_large", "x.jpeg;v=2", "image.php"),
        *("thumb.jpg!d", "x.1", "photo.v2", "5f3a.image", "x.jpg@!w", "x.bin", "x."),
    ],
)
@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "AVIF", "JPEG2000"]
)
def test_a_file_whose_suffix_says_nothing_is_recognised_by_its_content(
    name, kind, tmp_path
):
    write(tmp_path, name, content=encode(PICTURE, kind))
    assert find_images(tmp_path) == ([name], Counter())


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("notes.txt", b"good dogs", ".txt"),
        ("labels.csv", b"cat,1", ".csv"),
        ("x.jxl", b"\xff\x0a\x00", ".jxl"),
        ("x.svg", b"<svg/>", ".svg"),
        # Cameras' raw files begin like TIFF, and Pillow would read their thumbnails.
        ("x.nef", encode(PICTURE, "TIFF"), ".nef"),
        ("x.npy", b"\x93NUMPY", ".npy"),
        ("x.h5", b"\x89HDF\r\n\x1a\n", ".h5"),
        ("README", b"BMW and Python are here", "no suffix"),
        ("empty", b"", "no suffix"),
        ("x.jpg?resize=800", b"<html>404</html>", "other suffix"),
        ("x.jpg~", JPEG, "other suffix"),
        ("x.jpg.part", JPEG, ".part"),
        ("x.jpg.gz", JPEG, ".gz"),
        (".hidden.jpg", JPEG, "hidden"),
    ],
)
def test_other_files_are_counted_by_kind(name, content, kind, tmp_path):
    write(tmp_path, name, content=content)
    assert find_images(tmp_path) == ([], Counter({kind: 1}))
    assert kind_of_other(tmp_path / name) == kind


def test_a_file_with_a_known_suffix_is_not_opened(tmp_path):
    # It need not even be an image, which decoding then reports.
    write(tmp_path, "1.jpg", "2.HEIC", "3.tif", content=b"")
    assert find_images(tmp_path).paths == ["1.jpg", "2.HEIC", "3.tif"]


def test_what_operating_systems_leave_in_folders_is_not_counted(tmp_path):
    litter = (".DS_Store", "Thumbs.db", "desktop.ini", "._1.jpg", "__MACOSX/._1.jpg")
    write(tmp_path, "1.jpg", *litter, "@eaDir/1.jpg", "a/.DS_Store")
    assert find_images(tmp_path) == (["1.jpg"], Counter())


# Which folders are searched.


def by_torchvision(folder: pathlib.Path) -> list[str]:
    """Returns the files below a class folder in the order of its `make_dataset`."""
    return [
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
    ]


def test_images_in_subfolders_are_found_in_the_order_of_torchvision(tmp_path):
    write(tmp_path, "z.jpg", "a/b/1.jpg", "a/2.jpg", "a-b/3.jpg", "B/4.jpg", "10.jpg")
    write(tmp_path, "9.jpg", "a/b/c/d/5.jpg", "a.jpg/6.jpg", "é/7.jpg", "\n/ 8.jpg")
    (tmp_path / "linked").symlink_to("a/b")
    (tmp_path / "x.jpg").symlink_to("z.jpg")
    assert find_images(tmp_path) == (by_torchvision(tmp_path), Counter())
    assert len(find_images(tmp_path).paths) == 14


def test_links_that_lead_back_are_left_out(tmp_path):
    write(tmp_path, "cat/1.jpg", "dog/2.jpg", "dog/puppy/3.jpg")
    # To itself, to the folder, to a folder around it, and from one to the other and
    # back.
    (tmp_path / "cat/self").symlink_to("self")
    (tmp_path / "cat/here").symlink_to(".")
    (tmp_path / "cat/up").symlink_to("..")
    (tmp_path / "cat/dogs").symlink_to("../dog")
    (tmp_path / "dog/puppy/cats").symlink_to("../../cat")
    images = find_images(tmp_path / "cat")
    assert images.paths == ["1.jpg", "dogs/2.jpg", "dogs/puppy/3.jpg"]
    assert images.left_out == {"broken link": 1, "link to a folder around it": 3}


def test_pipes_sockets_and_broken_links_are_left_out_and_hang_nothing(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link.jpg").symlink_to("pipe.jpg")
    (tmp_path / "lost.jpg").symlink_to("nowhere.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        # The path of a socket has at most 108 bytes.
        server.bind(os.path.relpath(tmp_path / "socket.png"))
    images = find_images(tmp_path)
    assert images == ([], Counter({"not a regular file": 4, "broken link": 1}))


READ_AS_NOBODY = """
import os
from resnet_jax.data.image_files import find_images
from resnet_jax.errors import UserError
if os.getuid() == 0:
    os.setuid(65534)
try:
    print(find_images('.'))
except UserError as error:
    print(error)
"""


def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=f"folder {tmp_path}/cat cannot be read: No "):
        find_images(tmp_path / "cat")
    write(tmp_path, "cat/locked/1.jpg")
    locked = tmp_path / "cat/locked"
    locked.chmod(0)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", READ_AS_NOBODY],
        # Nobody may enter it from outside.
        cwd=tmp_path / "cat",
        env=environment,
        capture_output=True,
        text=True,
    )
    locked.chmod(0o755)
    assert "folder ./locked cannot be read: Permission denied" in done.stdout, (
        done.stderr
    )


def test_a_description_names_the_most_frequent_kinds():
    assert describe(Counter()) == ""
    assert describe(Counter({".txt": 1})) == "1 file is left out (.txt: 1)"
    kinds = Counter({f".{letter}": 1000 + k for k, letter in enumerate("abcdefg")})
    assert describe(kinds) == (
        "7,021 files are left out (.g: 1,006, .f: 1,005, .e: 1,004, .d: 1,003, .c:"
        " 1,002, other kinds: 2,001)"
    )
