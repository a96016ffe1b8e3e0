"""Image folders: which of their folders are splits, and the images of one split."""

import os
import pathlib
from collections import Counter
from collections.abc import Collection

from resnet_jax.data.image_files import (
    count_images,
    describe,
    entries_of,
    find_images,
    is_folder,
    kind_of_other,
    leads_back,
)
from resnet_jax.data.source_protocol import checksum
from resnet_jax.data.splits import EVAL_NAMES, is_training
from resnet_jax.errors import BadImageError, UserError, check_known
from resnet_jax.persistence import storage

# The one split of a folder of class folders.
ONLY_SPLIT = "train"


class FolderSource:
    """One split of an image folder, with its classes in alphabetical order.

    The folder is laid out as `PATH/SPLIT/CLASS/IMAGE.jpg`, or as `PATH/CLASS/IMAGE.jpg`
    with the one split `train`; see `folder_splits`. The images of a class may be in
    subfolders. Hidden folders are skipped, and files that are not images (see
    `image_files`) are counted.

    Attributes:
      root: The folder that holds the class folders of the split.
      title: The path of that folder.
      classes: The names of the classes, which are the names of their folders.
      paths: The images' paths below `root`.
      labels: The images' labels.
      left_out: The number of other files below `root` by kind, such as `.txt`.
    """

    def __init__(self, path: str, split: str):
        folders_of = split_folders(path, [split])
        check_known(f"split {split!r}", split, folders_of)
        self.root = folders_of[split]
        self.title = str(self.root)
        self.left_out: Counter[str] = Counter()
        folders = _folders(self.root, self.left_out)
        if not folders:
            raise UserError(
                f"{self.root} holds no class folders; a folder source is laid out as"
                f" {layouts(path)}."
            )
        self.classes = tuple(folders)
        self.paths: list[str] = []
        self.labels: list[int] = []
        for label, name in enumerate(folders):
            paths, left_out = find_images(self.root / name)
            self.left_out += left_out
            if not paths:
                others = f" ({found})" if (found := describe(left_out)) else ""
                raise UserError(
                    f"{self.root / name} holds no images{others}; add some, or remove"
                    " the class from every split before a run begins."
                )
            self.paths += [f"{name}/{path}" for path in paths]
            self.labels += [label] * len(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return read_image(self.name(index)), self.labels[index]

    def name(self, index: int) -> str:
        """Returns the path of an image."""
        return os.path.join(self.root, self.paths[index])

    def digest(self) -> str:
        """Returns a checksum of the paths below `root` and the labels."""
        return checksum(self.paths, self.labels)


def layouts(root: str | pathlib.Path) -> str:
    """Returns how an image folder is laid out, for messages."""
    return f"{root}/SPLIT/CLASS/IMAGE.jpg or {root}/CLASS/IMAGE.jpg"


def read_image(path: str) -> bytes:
    """Returns the content of an image file.

    Raises:
      BadImageError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadImageError(f"{path}: cannot be read: {error.strerror}.") from None


def split_folders(path: str, wanted: Collection[str] = ()) -> dict[str, pathlib.Path]:
    """Returns the folder of each split of an image folder, by the name of the split.

    The folders in `path` are splits if one of them is named like a training split and
    most of its images are in folders of their own. Otherwise they are classes, and the
    one split is `train`, unless all of them are named like splits or they look like
    several splits of the same classes.

    Args:
      path: The image folder.
      wanted: The names of the splits that are asked for; empty for none. The folders
        are splits if one of these names is that of a folder with class folders.

    Raises:
      UserError: There is no such folder, or it holds no folders.
    """
    root = _root(path)
    if not os.path.isdir(root):
        raise UserError(f"There is no folder {root}.")
    names = _folders(root, Counter())
    if not names:
        lacking = "class folders, only images" if count_images(root) else "images"
        raise UserError(
            f"{root} holds no {lacking}; a folder source is laid out as"
            f" {layouts(root)}."
        )
    asked = [root / name for name in names if name in wanted and name != ONLY_SPLIT]
    for_training = any(map(is_training, wanted))
    if any(map(_has_class_folders, asked)) or _are_splits(root, names, for_training):
        return {name: root / name for name in names}
    return {ONLY_SPLIT: root}


def folder_splits(path: str) -> list[str]:
    """Returns the names of the splits of an image folder; see `split_folders`."""
    return list(split_folders(path))


def eval_splits(path: str, wanted: Collection[str] = ()) -> list[str]:
    """Returns the splits on which a network can be evaluated that knows the classes.

    These hold folders of the same classes as the training split, if there is one. A
    test split often holds unlabelled images instead, and others hold masks.

    Args:
      path: The image folder.
      wanted: The names of the splits that are asked for; see `split_folders`.
    """
    folders = split_folders(path, wanted)
    classes = {name: set(_folders(folders[name], Counter())) for name in folders}
    trained = [classes[name] for name in folders if is_training(name)]
    known = set().union(*trained)
    return [name for name in folders if classes[name] & (known or classes[name])]


def _root(path: str) -> pathlib.Path:
    return storage.kept_copy(storage.path_of(path)).expanduser()


def _are_splits(root: pathlib.Path, names: list[str], for_training: bool) -> bool:
    """Tells whether the folders in an image folder are splits, and not classes.

    Args:
      root: The image folder.
      names: The names of the folders in it.
      for_training: Tells whether a training split is asked for.
    """
    training = [name for name in names if is_training(name)]
    evaluated = [name for name in names if name.casefold() in EVAL_NAMES]
    others = [name for name in names if name not in (*training, *evaluated)]
    if any(_is_split(root / name) for name in training):
        return True
    if not others or (training and evaluated):
        return True
    # Without a folder for training, only classes can be trained on; but one class alone
    # is unlikely.
    if for_training and len(names) > 1:
        return False
    if any(_is_split(root / name) for name in evaluated):
        return not any(count_images(root / name) for name in others)
    classes = [_folders(root / name, Counter()) for name in names]
    alike = len(names) == 1 or (
        len(classes[0]) > 1 and all(folders == classes[0] for folders in classes)
    )
    return alike and all(_is_split(root / name) for name in names)


def _is_split(folder: pathlib.Path) -> bool:
    """Tells whether most images of a folder are in folders of their own."""
    outside, inside = count_images(folder), 0
    for name in _folders(folder, Counter()):
        inside += len(find_images(folder / name).paths)
        if inside > outside:
            return True
    return False


def _has_class_folders(folder: pathlib.Path) -> bool:
    return any(find_images(folder / name).paths for name in _folders(folder, Counter()))


def _folders(path: pathlib.Path, left_out: Counter[str]) -> list[str]:
    """Returns the names of the folders in a folder, and counts what is left out."""
    names = []
    for entry in entries_of(path):
        if not is_folder(entry):
            kind = kind_of_other(entry.path)
            left_out[kind or "outside of class folders"] += 1
        elif entry.is_symlink() and leads_back(entry.path, os.path.realpath(path)):
            left_out["link to a folder around it"] += 1
        elif entry.name.startswith("."):
            left_out["hidden"] += 1
        else:
            names.append(entry.name)
    return sorted(names)
