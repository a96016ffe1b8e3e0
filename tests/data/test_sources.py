"""Sources hold every image once with its label, and report mistakes in their names."""

import pathlib

import numpy as np
import pytest

from resnet_jax.data.derived_sources import check_same_classes
from resnet_jax.data.folder_source import folder_splits
from resnet_jax.data.sources import open_source
from resnet_jax.errors import UserError
from tests.helpers.pictures import encode, noise, write_folder

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    "source, nearest",
    [
        ("tdfs:cifar10", "Did you mean tfds"),
        ("folders:/tmp", "Did you mean folder"),
        ("digit", "Did you mean digits"),
        ("digits:1", "Did you mean digits"),
        ("tfds", "tfds:NAME"),
        ("folder:", "folder:PATH"),
        ("fake:ten", "fake[:CLASSES[:SIZE]]"),
        ("fake:0", "fake[:CLASSES[:SIZE]]"),
        ("fake:1:0", "fake[:CLASSES[:SIZE]]"),
        ("fake:1:2:3", "fake[:CLASSES[:SIZE]]"),
        ("webdataset", "tfds:NAME"),
        ("", "tfds:NAME"),
    ],
)
def test_an_unknown_source_is_reported_with_the_nearest_name(source, nearest):
    with pytest.raises(UserError) as raised:
        open_source(source, "train")
    assert repr(source) in str(raised.value)
    assert nearest in str(raised.value)
    # Where the kind is right, no other one is suggested.
    assert ("Did you mean" in str(raised.value)) == ("Did you mean" in nearest)


def test_digits_are_split_1437_to_360():
    train, test = open_source("digits", "train"), open_source("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == tuple("0123456789")


def test_each_of_the_1797_digits_is_in_one_split_with_its_label():
    from sklearn.datasets import load_digits

    original = load_digits()
    # Some digits are equal in all pixels, so they are counted.
    wanted = sorted(
        (np.round(image * (255 / 16)).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(original.images, original.target, strict=True)
    )
    examples = []
    for split in ("train", "test"):
        source = open_source("digits", split)
        for index in range(len(source)):
            image, label = source[index]
            assert image.shape == (8, 8, 1)
            assert image.dtype == np.uint8
            examples.append((image.tobytes(), label))
    assert len(wanted) == 1797
    assert sorted(examples) == wanted


def test_digits_span_black_to_white():
    images = open_source("digits", "train").images
    assert (images.min(), images.max()) == (0, 255)


def test_the_split_of_the_digits_never_changes():
    # With another split, accuracies could not be compared with earlier ones.
    firsts = {
        split: [open_source("digits", split)[index][1] for index in range(10)]
        for split in ("train", "test")
    }
    assert firsts == {
        "train": [6, 6, 2, 5, 6, 2, 2, 1, 9, 0],
        "test": [6, 6, 1, 9, 5, 1, 0, 2, 4, 4],
    }


def test_the_digits_have_no_other_split():
    with pytest.raises(UserError, match=r"'tets'\. Did you mean test"):
        open_source("digits", "tets")


def test_fake_images_have_the_shape_and_the_classes_asked_for():
    source = open_source("fake:7:50", "train", fake_shape=(5, 6, 3))
    assert len(source) == 50
    assert len(source.classes) == 7
    examples = [source[index] for index in range(50)]
    assert {image.shape for image, _ in examples} == {(5, 6, 3)}
    assert {label for _, label in examples} == set(range(7))
    # It is noise, and the same each time.
    assert examples[0][0].std() > 10
    again = open_source("fake:7:50", "train", fake_shape=(5, 6, 3))
    assert all((again[i][0] == examples[i][0]).all() for i in range(50))


def test_fake_has_the_size_of_imagenet_by_default():
    assert len(open_source("fake", "train")) == 1_281_167
    assert len(open_source("fake", "validation")) == 50_000
    assert len(open_source("fake", "train").classes) == 1000


def test_fake_has_no_other_split():
    with pytest.raises(UserError, match=r"'valid'\. Did you mean validation"):
        open_source("fake", "valid")


JPEG = encode(noise(0, 12, 10), "JPEG")
ZOO = {
    "train/dog/b.jpg": JPEG,
    "train/dog/a.jpg": encode(noise(1, 12, 10), "JPEG"),
    "train/Cat/1.JPEG": JPEG,
    "train/Cat/2.JPG": JPEG,
    "train/Cat/3.PnG": encode(noise(2, 12, 10), "PNG"),
    "train/ant/x.png": encode(noise(3, 12, 10), "PNG"),
    "val/ant/x.png": encode(noise(4, 12, 10), "PNG"),
    "val/Cat/1.jpg": JPEG,
    "val/dog/1.jpg": JPEG,
    # None of these is an image, a class or a split.
    "train/dog/.hidden.jpg": JPEG,
    "train/dog/._b.jpg": b"macOS writes this on other disks",
    "train/dog/notes.txt": b"good dogs",
    "train/dog/Thumbs.db": b"Windows writes this",
    "train/.cache/x.jpg": JPEG,
    "train/classes.txt": b"",
    ".git/config/x.jpg": JPEG,
    "README.md": b"",
}


def test_a_folder_gives_its_images_by_class_in_alphabetical_order(tmp_path):
    source = open_source(write_folder(tmp_path, ZOO), "train")
    # Sorted as by Python, capitals first, and as by torchvision's ImageFolder.
    assert source.classes == ("Cat", "ant", "dog")
    expected = [
        ("Cat/1.JPEG", 0),
        ("Cat/2.JPG", 0),
        ("Cat/3.PnG", 0),
        ("ant/x.png", 1),
        ("dog/a.jpg", 2),
        ("dog/b.jpg", 2),
    ]
    assert len(source) == len(expected)
    for index, (name, label) in enumerate(expected):
        assert source[index] == (ZOO[f"train/{name}"], label)
        assert source.name(index) == str(tmp_path / "train" / name)


def test_both_splits_of_a_folder_number_the_classes_alike(tmp_path):
    folder = write_folder(tmp_path, ZOO)
    train, val = open_source(folder, "train"), open_source(folder, "val")
    assert train.classes == val.classes
    check_same_classes(train, val)


def test_a_link_to_a_folder_is_a_class(tmp_path):
    write_folder(tmp_path / "elsewhere", {"dog/1.jpg": JPEG})
    folder = write_folder(tmp_path / "data", {"train/cat/1.jpg": JPEG})
    (tmp_path / "data/train/dog").symlink_to(tmp_path / "elsewhere/dog")
    source = open_source(folder, "train")
    assert source.classes == ("cat", "dog")
    assert source[1] == (JPEG, 1)


def test_a_class_has_the_images_in_its_subfolders(tmp_path):
    deep = {"train/Cat/b/deep/4.jpg": JPEG, "train/Cat/a/5.jfif": JPEG}
    source = open_source(write_folder(tmp_path, ZOO | deep), "train")
    assert source.classes == ("Cat", "ant", "dog")
    names = ["Cat/1.JPEG", "Cat/2.JPG", "Cat/3.PnG", "Cat/a/5.jfif", "Cat/b/deep/4.jpg"]
    assert source.paths[:5] == names and source.labels[:6] == [0] * 5 + [1]
    assert source[4] == (JPEG, 0)


def test_files_that_are_not_taken_are_reported_once_with_their_kinds(tmp_path, caplog):
    files = {"train/stray.jpg": JPEG, "train/ant/x.jxl": b"", "train/dog/y.jxl": b""}
    folder = write_folder(tmp_path, ZOO | files)
    for split in ("train", "train[:50%]", "train+val", "val"):
        open_source(folder, split)
    assert caplog.messages == [
        f"{tmp_path}/train: 7 files are left out (.jxl: 2, .txt: 2, hidden: 2, outside"
        " of class folders: 1)."
    ]


@pytest.mark.parametrize(
    "name", ["a\nb", " a ", "\t", "É", "E\u0301", "0", "a,b", "\udcff"]
)
def test_classes_and_images_may_have_any_name(name, tmp_path):
    files = {f"{split}/{name}/{name}.jpg": JPEG for split in ("train", "val")}
    folder = write_folder(
        tmp_path, files | {f"{s}/z/1.jpg": JPEG for s in ("train", "val")}
    )
    train, val = open_source(folder, "train"), open_source(folder, "val")
    assert train.classes == val.classes == tuple(sorted([name, "z"]))
    check_same_classes(train, val)
    assert train.digest() == val.digest()
    assert train[train.classes.index(name)] == (JPEG, train.classes.index(name))


def test_classes_whose_names_differ_in_case_are_two_classes(tmp_path):
    files = {f"train/{name}/1.jpg": JPEG for name in ("cat", "Cat", "CAT")}
    source = open_source(write_folder(tmp_path, files), "train")
    assert source.classes == ("CAT", "Cat", "cat")


def test_a_link_to_a_folder_around_it_is_no_class_and_no_split(tmp_path):
    folder = write_folder(tmp_path, {"train/cat/1.jpg": JPEG, "__MACOSX/x/1.jpg": JPEG})
    (tmp_path / "train/all").symlink_to("..")
    (tmp_path / "latest").symlink_to(".")
    assert open_source(folder, "train").classes == ("cat",)
    assert folder_splits(str(tmp_path)) == ["train"]


def test_a_folder_under_the_home_directory_is_found(tmp_path, monkeypatch):
    write_folder(tmp_path / "pets", ZOO)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("folder:~/pets", "train")) == 6


def test_a_missing_folder_is_reported(tmp_path):
    with pytest.raises(UserError, match=f"no folder {tmp_path}/nowhere"):
        open_source(f"folder:{tmp_path}/nowhere", "train")


def test_an_unknown_split_of_a_folder_is_reported_with_the_nearest(tmp_path):
    folder = write_folder(tmp_path, ZOO)
    with pytest.raises(UserError, match=r"'vall'\. Did you mean val"):
        open_source(folder, "vall")
    # Hidden folders are not proposed.
    with pytest.raises(UserError, match=r"'zzz'\. Known: train, val"):
        open_source(folder, "zzz")


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": b""},
        {"train/README.md": b""},
        {"train/1.jpg": JPEG},
        {".hidden/cat/1.jpg": JPEG},
    ],
)
def test_a_folder_without_images_is_reported_with_the_right_layout(files, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/SPLIT/CLASS/IMAGE.jpg"):
        open_source(write_folder(tmp_path, files), "train")


def test_a_class_without_images_is_named(tmp_path):
    folder = write_folder(tmp_path, ZOO | {"train/emu/notes.txt": b""})
    with pytest.raises(UserError, match=f"{tmp_path}/train/emu holds no images"):
        open_source(folder, "train")


@pytest.mark.parametrize("richer, poorer", [("train", "val"), ("val", "train")])
def test_a_class_that_one_split_lacks_is_named(richer, poorer, tmp_path):
    folder = write_folder(tmp_path, ZOO | {f"{richer}/bee/1.jpg": JPEG})
    train, val = open_source(folder, "train"), open_source(folder, "val")
    with pytest.raises(UserError) as raised:
        check_same_classes(train, val)
    message = str(raised.value)
    assert "'bee'" in message
    assert f"in {tmp_path}/{richer} but not in {tmp_path}/{poorer}" in message


@pytest.mark.parametrize("source", ["fake:99999999999", "fake:10:99999999999"])
def test_fake_data_too_large_to_list_are_an_error(source):
    with pytest.raises(UserError, match="at most 16,777,216"):
        open_source(source, "train")


def test_a_path_without_its_kind_is_told_how_to_write_it(tmp_path):
    with pytest.raises(UserError, match=rf"Did you mean folder:{tmp_path}\?"):
        open_source(str(tmp_path), "train")
    with pytest.raises(UserError, match=r"Did you mean csv:my/table\.csv\?"):
        open_source("my/table.csv", "train")
