"""The layouts of image folders: which folders are splits, and which are classes."""

import pytest

from resnet_jax.data.folder_source import FolderSource, eval_splits, folder_splits
from resnet_jax.data.sources import open_source
from resnet_jax.errors import UserError
from tests.helpers.pictures import encode, noise, write_folder

JPEG = encode(noise(0, 12, 10), "JPEG")


def folder(root, *names: str) -> str:
    """Writes a picture, or a text if its suffix says so, under each name."""
    contents = {name: b"" if name.endswith("txt") else JPEG for name in names}
    return write_folder(root, contents).removeprefix("folder:")


def both(*names: str) -> tuple[str, ...]:
    """Returns the names below a training split and below an eval split."""
    return tuple(f"{split}/{name}" for split in ("train", "val") for name in names)


# The classes of the split `train` of folders that have no other split.
CLASSES = {
    "pictures of two classes": (("cat/1.jpg", "dog/1.jpg"), ("cat", "dog")),
    "a class named train": (
        ("train/1.jpg", "car/1.jpg", "bus/1.jpg"),
        ("bus", "car", "train"),
    ),
    "a class named train with a few pictures in a subfolder": (
        ("train/1.jpg", "train/2.jpg", "train/steam/3.jpg", "car/1.jpg"),
        ("car", "train"),
    ),
    "classes named test and val": (
        ("test/1.jpg", "val/1.jpg", "cat/1.jpg"),
        ("cat", "test", "val"),
    ),
    "a class named test, all in subfolders": (
        ("test/a/1.jpg", "test/b/1.jpg", "cat/a/1.jpg", "cat/b/1.jpg"),
        ("cat", "test"),
    ),
    "all pictures in subfolders": (
        ("n01/images/1.jpg", "n02/images/1.jpg"),
        ("n01", "n02"),
    ),
    "the same subfolders in each class": (
        ("cat/in/1.jpg", "cat/out/1.jpg", "dog/in/1.jpg", "dog/out/1.jpg"),
        ("cat", "dog"),
    ),
    "pictures beside the classes": (
        ("cat/1.jpg", "dog/1.png", "x.jpg"),
        ("cat", "dog"),
    ),
    "spaces, mixed suffixes and hidden files": (
        ("my cat/a b.JPeG", "my cat/.h.jpg", " dog/1.webp", ".git/1.jpg", "notes.txt"),
        (" dog", "my cat"),
    ),
    "one class": (("cat/1.jpg",), ("cat",)),
}


@pytest.mark.parametrize("case", CLASSES)
def test_a_folder_without_splits_has_the_split_train(case, tmp_path):
    names, classes = CLASSES[case]
    source = open_source(f"folder:{folder(tmp_path, *names)}", "train")
    assert source.classes == classes
    assert source.title == str(tmp_path)


# The splits of folders that have some, and the classes of the first of them.
SPLITS = {
    "the usual layout": (both("cat/1.jpg", "dog/1.jpg"), ["train", "val"], "train"),
    "other names": (
        ("Training/cat/1.jpg", "Training/dog/1.jpg", "Testing/cat/1.jpg"),
        ["Testing", "Training"],
        "Training",
    ),
    "masks beside the splits": (
        (*both("cat/1.jpg", "dog/1.jpg"), "masks/1.png"),
        ["masks", "train", "val"],
        "train",
    ),
    "stray pictures beside the classes": (
        (*both("cat/1.jpg", "dog/1.jpg"), "train/stray.jpg"),
        ["train", "val"],
        "train",
    ),
    "unlabelled pictures for the test": (
        ("train/cat/1.jpg", "train/dog/1.jpg", "test/1.jpg", "test/2.jpg"),
        ["test", "train"],
        "train",
    ),
    "classes in subfolders": (
        ("train/cat/images/1.jpg", "train/dog/images/1.jpg", "val/images/1.jpg"),
        ["train", "val"],
        "train",
    ),
    "one split of any name": (("all/cat/1.jpg", "all/dog/1.jpg"), ["all"], "all"),
    "several splits of any name": (
        ("a/cat/1.jpg", "a/dog/1.jpg", "b/cat/1.jpg", "b/dog/1.jpg"),
        ["a", "b"],
        "b",
    ),
    "only splits to evaluate": (
        ("val/cat/1.jpg", "val/dog/1.jpg", "test/cat/1.jpg"),
        ["test", "val"],
        "val",
    ),
}


@pytest.mark.parametrize("case", SPLITS)
def test_a_folder_with_splits_has_the_classes_of_each(case, tmp_path):
    names, splits, split = SPLITS[case]
    path = folder(tmp_path, *names)
    assert folder_splits(path) == splits
    source = open_source(f"folder:{path}", split)
    assert source.classes == ("cat", "dog")
    assert source.title == f"{tmp_path}/{split}"


def test_a_split_that_is_asked_for_by_name_is_one_beside_folders_of_pictures(tmp_path):
    path = folder(tmp_path, "old/cat/1.jpg", "old/dog/1.jpg", "old/2.jpg", "new/1.jpg")
    assert open_source(f"folder:{path}", "old[:50%]").classes == ("cat", "dog")
    assert open_source(f"folder:{path}", "train").classes == ("new", "old")


def test_the_folder_of_one_split_can_be_given_itself(tmp_path):
    path = folder(tmp_path, *both("cat/1.jpg", "dog/1.jpg"))
    whole, part = FolderSource(path, "train"), FolderSource(f"{path}/train", "train")
    assert part.classes == whole.classes
    assert part.digest() == whole.digest()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("1.jpg", "2.jpg"), "holds no class folders, only images; a folder source is"),
        (("notes.txt",), "holds no images; a folder source is"),
        (("train/1.jpg", "val/1.jpg"), "train holds no class folders"),
        (("cat/1.jpg", "logs/notes.txt"), r"logs holds no images \(1 file is left out"),
        # The folder of the splits is one level below.
        (("photos/train/1.jpg", "photos/val/1.jpg"), "no split 'train'. Known: photos"),
    ],
)
def test_a_folder_that_is_laid_out_otherwise_is_an_error(names, message, tmp_path):
    with pytest.raises(UserError, match=message):
        open_source(f"folder:{folder(tmp_path, *names)}", "train")


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (both("cat/1.jpg", "dog/1.jpg"), ["train", "val"]),
        # A class that is missing is a mistake, which is reported when it is opened.
        (("train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg"), ["train", "val"]),
        (("train/cat/1.jpg", "test/1.jpg", "val/images/1.jpg"), ["train"]),
    ],
)
def test_splits_without_the_classes_of_the_training_split_are_not_evaluated(
    names, splits, tmp_path
):
    assert eval_splits(folder(tmp_path, *names)) == splits
