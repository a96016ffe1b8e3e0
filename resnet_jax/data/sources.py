"""The data sources, opened by the names that users write in `data.source`.

`KINDS`, at the end of this file, has the kinds of sources. To add one, write a class
with the members of `source_protocol.NamedSource` that pickles small, since worker
processes get a copy, and add a row.
"""

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.data.csv_source import CsvSource, csv_splits
from resnet_jax.data.derived_sources import (
    Combined,
    Subset,
    check_same_classes,
    with_classes,
)
from resnet_jax.data.folder_source import FolderSource, eval_splits, split_folders
from resnet_jax.data.image_files import describe
from resnet_jax.data.source_protocol import NamedSource, checksum
from resnet_jax.data.splits import names_in, slices_of
from resnet_jax.data.tfds_source import TfdsSource, tfds_builder
from resnet_jax.errors import UserError, check_known, nearest
from resnet_jax.persistence import storage

log = logging.getLogger(__name__)

# The number of classes, and the number of images by split, of data sets that `plan`
# need not have on disk.
KNOWN = {
    "tfds:imagenet2012": (1000, {"train": 1_281_167, "validation": 50_000}),
    "tfds:cifar10": (10, {"train": 50_000, "test": 10_000}),
    "tfds:cifar100": (100, {"train": 50_000, "test": 10_000}),
    "tfds:fashion_mnist": (10, {"train": 60_000, "test": 10_000}),
    "tfds:mnist": (10, {"train": 60_000, "test": 10_000}),
}
IMAGENET = KNOWN["tfds:imagenet2012"][1]
FAKE_SIZES = IMAGENET | {"test": IMAGENET["validation"]}
# Each process lists all classes and images.
MOST_FAKE = 2**24
# The value of `data.source` in a run whose data were passed to `train`; see
# `user_data.py`.
GIVEN = "train(data=...)"


class Splits(NamedTuple):
    """The names of the splits of a source.

    Attributes:
      names: All names.
      evaluated: The names of splits with which a network can be evaluated that was
        trained on another one.
    """

    names: list[str]
    evaluated: list[str]


def open_source(
    source: str,
    split: str,
    *,
    data_dir: str = "",
    fake_shape: tuple[int, int, int] = (224, 224, 3),
) -> NamedSource:
    """Opens one split of a data set.

    >>> digits = open_source("digits", "train[:10%]")
    >>> len(digits), digits.classes[:3], digits.title
    (144, ('0', '1', '2'), 'digits/train[0:144]')

    Args:
      source: A source in the form of its row of `KINDS`, such as `folder:PATH`.
      split: The name of the split, or slices of splits in tfds's syntax, such as
        `train[:10%]` or `train[10:]+test`. Where tfds has not shuffled the images
        already, slices are taken from a fixed permutation of the split.
      data_dir: The directory in which tfds keeps its data sets; empty for its default.
      fake_shape: The height, width and channels of the images of `fake`.

    Raises:
      UserError: The source or split is unknown, the data set is not prepared, a folder
        has no images or other classes than its sibling splits, or combined sources
        differ in their classes.
    """
    kind, address = _kind_of(source)
    return kind.open(address, split, data_dir=data_dir, fake_shape=fake_shape)


def splits_of(source: str, wanted: str = "", data_dir: str = "") -> Splits | None:
    """Returns the names of the splits of a source; None if it does not know them.

    Args:
      source: The source, as `open_source` takes it.
      wanted: The split, or slices of splits, that a user asks for. In a folder it may
        decide which folders are splits; see `folder_source.split_folders`.
      data_dir: The directory in which tfds keeps its data sets; empty for its default.

    Raises:
      UserError: The source is unknown or not there.
    """
    kind, address = _kind_of(source)
    return kind.splits and kind.splits(address, names_in(wanted), data_dir=data_dir)


def _kind_of(source: str) -> "tuple[Kind, str]":
    """Returns the kind of a source and the text after its colon."""
    name, _, address = source.partition(":")
    kind = KINDS.get(name)
    if kind and re.fullmatch(kind.address, source.removeprefix(name), re.DOTALL):
        return kind, address
    if source == GIVEN:
        raise UserError(
            "The images of this run were handed to resnet_jax.train(data=...). Resume"
            " it with such a call, or evaluate others with --config.data.source=SOURCE"
            " --config.data.eval_split=SPLIT."
        )
    # Where the kind is right, what follows it is missing or wrong.
    hint = "" if kind and kind.address else nearest(name, KINDS)
    if os.path.isdir(source) or source.endswith(".csv"):
        hint = (
            f" Did you mean {'csv' if source.endswith('.csv') else 'folder'}:{source}?"
        )
    forms = ", ".join(kind.form for kind in KINDS.values())
    raise UserError(
        f"There is no data source {source!r}.{hint} A source is written {forms}."
    )


def split_of(source: str, default: str = "") -> tuple[str, str]:
    """Parses `SOURCE@SPLIT` into source and split; a missing split is `default`."""
    name, at, split = source.rpartition("@")
    # The name of a directory may contain an @, the name of a split no slash.
    return (name, split) if at and "/" not in split else (source, default)


@dataclasses.dataclass(frozen=True)
class RecordedSplit:
    """A split of which only the classes and the size are known, as a run recorded them.

    Attributes:
      classes: The names of the classes, in the order of the labels.
      size: The number of images.
      title: The name of the split in messages and summaries.
    """

    classes: tuple[str, ...]
    size: int
    title: str

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        raise UserError(f"{self.title} was not opened, so it has no image {index}.")

    def name(self, index: int) -> str:
        """Returns the name of an example in messages."""
        return f"{self.title}/{index}"

    def digest(self) -> str:
        """Returns a checksum of what is known of the split."""
        return checksum(self.title, self.classes, self.size)


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey.

    The split is fixed: `test` is every fifth image of a permutation (360 images),
    `train` the rest (1,437).

    Attributes:
      images: The pixels, uint8[n, 8, 8].
      labels: The digits, int[n].
      title: The name of the split in messages and summaries.
    """

    classes = tuple("0123456789")
    splits = ("train", "test")

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        check_known(f"split {split!r}", split, self.splits)
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        held_out = np.arange(len(order)) % 5 == 0
        chosen = order[held_out if split == "test" else ~held_out]
        # The grey levels of scikit-learn are 0 to 16.
        self.images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.labels = digits.target[chosen]
        self.title = f"digits/{split}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index][:, :, None], int(self.labels[index])

    def name(self, index: int) -> str:
        """Returns the name of an example in messages."""
        return f"{self.title}/{index}"

    def digest(self) -> str:
        """Returns a checksum of the split and its labels."""
        return checksum(self.title, self.labels.tolist())


@dataclasses.dataclass(frozen=True)
class FakeSource:
    """Noise with labels, as fast as memory: for benchmarks and dry runs.

    Attributes:
      split: The name of the split.
      shape: The height, width and channels of the images.
      num_classes: The number of classes.
      size: The number of images; 0 for as many as in ImageNet, so that schedules have
        their usual length.
    """

    split: str
    shape: tuple[int, int, int] = (224, 224, 3)
    num_classes: int = 1000
    size: int = 0

    def __post_init__(self):
        check_known(f"split {self.split!r}", self.split, FAKE_SIZES)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes: class 0, class 1, ..."""
        return tuple(f"class {i}" for i in range(self.num_classes))

    @property
    def title(self) -> str:
        """The name of the split in messages and summaries."""
        return f"fake/{self.split}"

    def __len__(self) -> int:
        return self.size or FAKE_SIZES[self.split]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return _noise(self.shape)[index % 16], index % self.num_classes

    def name(self, index: int) -> str:
        """Returns the name of an example in messages."""
        return f"{self.title}/{index}"

    def digest(self) -> str:
        """Returns a checksum of the split and its numbers of classes and images."""
        return checksum(self.title, self.num_classes, len(self))


@functools.cache
def _noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, *shape), np.uint8)


def _open_folder(path: str, split: str, **_: Any) -> NamedSource:
    # A folder in an object store is listed once.
    root = str(storage.kept_copy(storage.path_of(path)))

    def open_split(name: str) -> FolderSource:
        source = FolderSource(root, name)
        if source.left_out:
            _warn_once(f"{source.title}: {describe(source.left_out)}.")
        return source

    known = split_folders(root, names_in(split))
    return _open_slices(open_split, known, split, f"folder:{path}")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def _open_fake(
    address: str, split: str, *, fake_shape: tuple[int, int, int], **_: Any
) -> NamedSource:
    numbers = [int(number) for number in address.split(":") if address]
    title = ":".join(["fake", *map(str, numbers)])
    if max(numbers, default=0) > MOST_FAKE:
        raise UserError(
            f"{title} is too large: each number can be at most {MOST_FAKE:,}."
        )
    return _open_slices(
        lambda name: FakeSource(name, fake_shape, *numbers),
        *(FAKE_SIZES, split, title),
    )


def _open_mix(text: str, split: str, **options: Any) -> NamedSource:
    """Opens `[WEIGHT*]SOURCE[@SPLIT],...`."""
    parts, weights = [], []
    for entry in text.split(","):
        weight, star, name = entry.strip().partition("*")
        if not star:
            weight, name = "1", weight
        if not re.fullmatch(r"\d+|\d*\.\d+", weight.strip()):
            raise UserError(
                f"The weight {weight!r} in mix:{text} is not a number. Weights are"
                " written as in mix:3*tfds:NAME,0.5*folder:PATH."
            )
        weights.append(float(weight))
        parts.append(open_source(*split_of(name, split), **options))
    for part in parts[1:]:
        check_same_classes(parts[0], part)
    return Combined(
        tuple(with_classes(part, parts[0].classes) for part in parts), tuple(weights)
    )


def _open_slices(
    open_split: Callable[[str], NamedSource],
    known: Iterable[str],
    split: str,
    title: str,
) -> NamedSource:
    """Opens a split, or a sum of slices of splits."""
    known = list(known)
    name = split if split in known else split.strip()
    if name in known:
        return open_split(name)
    open_once = functools.cache(open_split)
    slices = slices_of(split, known, lambda name: [len(open_once(name))], title)
    parts = []
    for name, start, stop in slices:
        source = open_once(name)
        order = np.random.default_rng(0).permutation(len(source))
        part_title = f"{source.title}[{start}:{stop}]"
        parts.append(Subset(source, order[start:stop], part_title))
    weights = tuple(float(len(part)) for part in parts)
    return parts[0] if len(parts) == 1 else Combined(tuple(parts), weights)


def _splits_of_folder(path: str, wanted: Collection[str], **_: Any) -> Splits:
    root = str(storage.kept_copy(storage.path_of(path)))
    return Splits(list(split_folders(root, wanted)), eval_splits(root, wanted))


def _splits_of_tfds(name: str, wanted: Collection[str], data_dir: str) -> Splits:
    if f"tfds:{name}" in KNOWN:
        names = list(KNOWN[f"tfds:{name}"][1])
    else:
        names = list(tfds_builder(name, data_dir).info.splits)
    return Splits(names, names)


class Kind(NamedTuple):
    """A kind of data source: a row of `KINDS`.

    Attributes:
      form: The way in which users write a source of this kind.
      address: A pattern of the text after the name of the kind, with its colon.
      open: Opens a split, given the text after the colon, the split, and `data_dir` and
        `fake_shape` by name.
      splits: Returns the names of the splits and those that can be evaluated on, given
        the text after the colon, the names of the splits that are asked for, and
        `data_dir`; None if sources of this kind do not know.
    """

    form: str
    address: str
    open: Callable[..., NamedSource]
    splits: Callable[..., Splits] | None = None


KINDS = {
    # A data set by its name in tfds, or the directory of a prepared one.
    "tfds": Kind(
        "tfds:NAME[/CONFIG], tfds:DIRECTORY",
        ":.+",
        lambda address, split, data_dir, **_: TfdsSource(address, split, data_dir),
        _splits_of_tfds,
    ),
    # See `FolderSource`.
    "folder": Kind("folder:PATH", ":.+", _open_folder, _splits_of_folder),
    # See `CsvSource`.
    "csv": Kind(
        "csv:FILE",
        ":.+",
        lambda path, split, **_: _open_slices(
            functools.partial(CsvSource, path), csv_splits(path), split, f"csv:{path}"
        ),
        lambda path, wanted, **_: Splits(*(2 * [csv_splits(path)])),
    ),
    # See `DigitsSource`.
    "digits": Kind(
        "digits",
        "",
        lambda address, split, **_: _open_slices(
            DigitsSource, DigitsSource.splits, split, "digits"
        ),
        lambda *_, **__: Splits(*(2 * [list(DigitsSource.splits)])),
    ),
    # See `FakeSource`.
    "fake": Kind(
        "fake[:CLASSES[:SIZE]]",
        "(:[1-9][0-9]*){0,2}",
        _open_fake,
        lambda *_, **__: Splits(*(2 * [list(FAKE_SIZES)])),
    ),
    # Several sources combined by weight, see `derived_sources.Combined`.
    "mix": Kind("mix:[WEIGHT*]SOURCE[@SPLIT],...", ":.+", _open_mix),
}
