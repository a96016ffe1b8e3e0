"""Where examples come from: random access to (image, label), whatever the storage.

A source is named by a string: `tfds:NAME[/CONFIG]`, `tfds:DIRECTORY`, `folder:PATH`,
`digits`, `fake[:CLASSES[:SIZE]]` or `mix:[WEIGHT*]SOURCE[@SPLIT],...`. All of them
pickle small, since worker processes open them again.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from resnet_jax.data.tfds_source import TfdsSource, reason_of_tfds
from resnet_jax.errors import BadImageError, UserError, check_known, nearest
from resnet_jax.persistence import storage

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif"),
    *(".webp", ".ppm", ".pgm", ".tif", ".tiff"),
)
# Classes, and images by split, of data sets that can be planned for without them.
KNOWN = {
    "tfds:imagenet2012": (1000, {"train": 1_281_167, "validation": 50_000}),
    "tfds:cifar10": (10, {"train": 50_000, "test": 10_000}),
    "tfds:cifar100": (100, {"train": 50_000, "test": 10_000}),
    "tfds:fashion_mnist": (10, {"train": 60_000, "test": 10_000}),
    "tfds:mnist": (10, {"train": 60_000, "test": 10_000}),
}
IMAGENET = KNOWN["tfds:imagenet2012"][1]
FAKE_SIZES = IMAGENET | {"test": IMAGENET["validation"]}
KINDS = (
    *("tfds:NAME[/CONFIG]", "tfds:DIRECTORY", "folder:PATH", "digits"),
    *("fake[:CLASSES[:SIZE]]", "mix:[WEIGHT*]SOURCE[@SPLIT],..."),
)
# Stands for data that were handed to `train`; see `given.py`.
GIVEN = "train(data=...)"
# First word of the key of the random generator.
SHOTS = 3


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split: what `train` needs of your own data.

    >>> class Squares:
    ...     classes = ("dark", "bright")
    ...     def __len__(self):
    ...         return 100
    ...     def __getitem__(self, index):
    ...         label = index % 2
    ...         return np.full((32, 32, 3), 255 * label, np.uint8), label
    >>> isinstance(Squares(), Source)
    True

    `torchvision.datasets.ImageFolder(...)` is one, too.

    Attributes:
      classes: The names of the classes, in the order of the labels.
    """

    @property
    def classes(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Returns an image and its label, the same ones at every call.

        The image is the bytes of an image file, uint8 pixels [h, w, c] or [h, w], or an
        image of Pillow's. The label is the index of a class.
        """


@runtime_checkable
class NamedSource(Source, Protocol):
    """A source whose images have names, and which has a checksum.

    Its images are bytes or uint8[h, w, c]. Where images have several labels, these are
    an int array padded with -1.

    Attributes:
      where: The name of the split in a message.
    """

    where: str

    def name(self, index: int) -> str:
        """What to call the example in a message."""

    def digest(self) -> str:
        """Returns a checksum of the examples' names, order and labels.

        It reads no image and does not depend on where the data lie.
        """


def checksum(*facts: object) -> str:
    """Returns the SHA-256 of facts that JSON can write."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def open_source(
    source: str, split: str, *, data_dir: str = "", fake_shape=(224, 224, 3)
) -> NamedSource:
    """Opens one split of a data set.

    Args:
      source: `tfds:NAME[/CONFIG]`, `tfds:DIRECTORY` (of a prepared data set),
        `folder:PATH`, `digits`, `fake[:CLASSES[:SIZE]]` or a mix of them, see `Mix`.
      split: name of the split, or slices of some in tfds's syntax, such as
        `train[:10%]` or `train[10:]+test`. Where tfds has not shuffled the images
        already, slices are of a fixed permutation of the split.
      data_dir: where tfds keeps its data sets; empty: tfds's default.
      fake_shape: height, width and channels of the images of `fake`.

    Raises:
      UserError: unknown source or split, a data set that is not prepared, a folder
        without images or with other classes than its sibling splits, sources of a
        mix that differ in their classes.
    """
    kind, _, rest = source.partition(":")
    if kind == "mix" and rest:
        open_part = functools.partial(
            open_source, data_dir=data_dir, fake_shape=fake_shape
        )
        return _open_mix(rest, split, open_part)
    if kind == "tfds" and rest:
        return TfdsSource(rest, split, data_dir)
    if kind == "folder" and rest:
        return _open_slices(functools.partial(FolderSource, rest), split)
    if source == "digits":
        return _open_slices(DigitsSource, split)
    if re.fullmatch("fake(:[1-9][0-9]*(:[0-9]+)?)?", source):
        shape = tuple(fake_shape)
        numbers = [int(number) for number in rest.split(":") if rest]
        return _open_slices(lambda name: FakeSource(name, shape, *numbers), split)
    if source == GIVEN:
        raise UserError(
            "The images of this run were handed to resnet_jax.train(data=...). Resume"
            " it with such a call, or evaluate others with --config.data.source=SOURCE"
            " --config.data.eval_split=SPLIT."
        )
    hint = nearest(kind, ("tfds", "folder", "digits", "fake", "mix"))
    raise UserError(
        f"There is no data source {source!r}.{hint} A source is written"
        f" {', '.join(KINDS)}."
    )


def split_of(source: str, default: str = "") -> tuple[str, str]:
    """Cuts `SOURCE@SPLIT` into both; without one the split is the default."""
    name, at, split = source.rpartition("@")
    # A directory may be called so, a split may not.
    return (name, split) if at and "/" not in split else (source, default)


def _open_mix(
    text: str, split: str, open_part: Callable[[str, str], NamedSource]
) -> NamedSource:
    """Opens `[WEIGHT*]SOURCE[@SPLIT],...`."""
    parts, weights = [], []
    for entry in text.split(","):
        weight, star, name = entry.strip().partition("*")
        if not star:
            weight, name = "1", weight
        if not re.fullmatch(r"\d+|\d*\.\d+", weight.strip()):
            raise UserError(
                f"What is {weight!r} in mix:{text}? A mix is written"
                " mix:3*tfds:NAME,1*folder:PATH."
            )
        weights.append(float(weight))
        parts.append(open_part(*split_of(name, split)))
    for part in parts[1:]:
        check_same_classes(parts[0], part)
    return Mix(
        tuple(with_classes(part, parts[0].classes) for part in parts), tuple(weights)
    )


def _open_slices(open_split: Callable[[str], NamedSource], split: str) -> NamedSource:
    """Opens a split or, in tfds's syntax, a sum of slices of splits."""
    if "[" not in split and "+" not in split:
        return open_split(split)
    # Imported here: users and workers of other sources need not pay for it.
    from tensorflow_datasets.core import ReadInstruction, SplitInfo

    names = {part.split("[")[0].strip() for part in split.split("+")}
    whole = {name: open_split(name) for name in sorted(names)}
    sizes = {
        name: SplitInfo(name=name, shard_lengths=[len(source)], num_bytes=0)
        for name, source in whole.items()
    }
    try:
        slices = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UserError(f"Split {split!r}: {reason_of_tfds(error)}") from None
    parts = []
    for piece in slices:
        source = whole[piece.splitname]
        order = np.random.default_rng(0).permutation(len(source))
        first, behind = piece.from_ or 0, piece.to or len(source)
        where = f"{source.where}[{first}:{behind}]"
        parts.append(Subset(source, order[first:behind], where))
    weights = tuple(float(len(part)) for part in parts)
    return parts[0] if len(parts) == 1 else Mix(tuple(parts), weights)


def check_same_classes(train: NamedSource, test: NamedSource) -> None:
    """Raises UserError unless both splits number the same classes in the same way."""
    for source, other in ((train, test), (test, train)):
        missing = sorted(set(source.classes) - set(other.classes))
        if missing:
            raise UserError(
                f"Class {missing[0]!r} is in {source.where} but not in"
                f" {other.where}, so labels would differ; add it to both splits, or"
                " remove it from both before a run begins."
            )


def with_classes(source: NamedSource, classes: Sequence[str]) -> NamedSource:
    """The source with its labels as numbers of other classes, found by their names.

    Raises UserError with the first class that is not among them.
    """
    classes = tuple(classes)
    if source.classes == classes:
        return source
    number = {name: label for label, name in enumerate(classes)}
    for label, name in enumerate(source.classes):
        if name not in number:
            raise UserError(
                f"Class {label} of {source.where} is {name!r}, which is none of the"
                f" {len(classes)} classes of the network ({', '.join(classes[:3])},"
                " ...), so that labels cannot be compared; choose a data set with the"
                " same class names."
            )
    return Relabelled(source, classes, tuple(number[name] for name in source.classes))


def few_shot(source: NamedSource, shots: int, seed: int) -> NamedSource:
    """Some images of each class, drawn from a seed; of each source, if it is a mix.

    Raises UserError if a class has not as many.
    """
    if isinstance(source, Mix):
        parts = tuple(few_shot(part, shots, seed) for part in source.parts)
        return Mix(parts, source.weights)
    missing = np.full(len(source.classes), shots)
    chosen = []
    # Of a large data set, few of the examples are read until all classes are full.
    order = np.random.default_rng([SHOTS, seed]).permutation(len(source))
    for index in order.tolist():
        label = label_of(source, index)
        if missing[label]:
            missing[label] -= 1
            chosen.append(index)
        if not missing.any():
            return Subset(source, np.array(chosen), f"{source.where}, {shots} a class")
    label = int(np.argmax(missing))
    raise UserError(
        f"data.shots={shots}, but {source.where} has only {shots - missing[label]} of"
        f" class {source.classes[label]!r}."
    )


def label_of(source: NamedSource, index: int) -> int | np.ndarray:
    """The label of an example, without its image where that is faster."""
    if isinstance(source, Subset):
        return label_of(source.source, int(source.indices[index]))
    labels = getattr(source, "labels", None)
    return source[index][1] if labels is None else int(labels[index])


def sizes_and_shares(source: NamedSource) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Images of each source of a mix, and how many of them an epoch takes."""
    # Held in memory, a mix is still one.
    source = getattr(source, "origin", None) or source
    if isinstance(source, Mix):
        return source.sizes, source.shares
    return (len(source),), (len(source),)


@dataclasses.dataclass(frozen=True)
class RecordedSplit:
    """A split of which only the classes and the size are known, as a run recorded them.

    Attributes:
      classes: The names of the classes, in the order of the labels.
      size: The number of images.
      where: The name of the split in a message.
    """

    classes: tuple[str, ...]
    size: int
    where: str

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        raise UserError(f"{self.where} was not opened, so it has no image {index}.")

    def name(self, index: int) -> str:
        return f"{self.where}/{index}"

    def digest(self) -> str:
        return checksum(self.where, self.classes, self.size)


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of a source.

    Attributes:
      source: whose examples.
      indices: of the examples in the source.
      where: what to call the subset in a message.
    """

    source: NamedSource
    indices: np.ndarray
    where: str

    def __post_init__(self):
        if not len(self.indices):
            raise UserError(f"{self.where} holds no image.")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def digest(self) -> str:
        return checksum(self.source.digest(), self.indices.tolist())


@dataclasses.dataclass(frozen=True, eq=False)
class Relabelled:
    """A source whose classes have other numbers.

    Attributes:
      source: whose examples.
      classes: names of the classes, in the order of the new labels.
      labels_to: the new label of each old one.
    """

    source: NamedSource
    classes: tuple[str, ...]
    labels_to: tuple[int, ...]

    @property
    def where(self) -> str:
        return self.source.where

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int | np.ndarray]:
        image, label = self.source[index]
        if isinstance(label, int):
            return image, self.labels_to[label]
        # The last entry is for -1, which stands for no label.
        return image, np.array([*self.labels_to, -1])[label]

    def name(self, index: int) -> str:
        return self.source.name(index)

    def digest(self) -> str:
        return checksum(self.source.digest(), self.labels_to)


@dataclasses.dataclass(frozen=True, eq=False)
class Mix:
    """Several sources of the same classes: each example once, all weights apart.

    Training takes them in turns at random, as often as the weights say; see
    `loader.epoch_order`. An epoch is as many images as all sources have.

    Attributes:
      parts: the sources.
      weights: of each, above 0.
    """

    parts: tuple[NamedSource, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        for part, weight, share in zip(
            self.parts, self.weights, self.shares, strict=True
        ):
            if not share:
                raise UserError(
                    f"The weight {weight:g} of {part.where} leaves it no image of an"
                    f" epoch of {len(self)}; weights are above 0 and of like size."
                )

    @property
    def classes(self) -> tuple[str, ...]:
        return self.parts[0].classes

    @property
    def where(self) -> str:
        if self.shares == self.sizes:
            return " + ".join(part.where for part in self.parts)
        pairs = zip(self.weights, self.parts, strict=True)
        return " + ".join(f"{weight:g} x {part.where}" for weight, part in pairs)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """Images of each source."""
        return tuple(map(len, self.parts))

    @functools.cached_property
    def shares(self) -> tuple[int, ...]:
        """Images of each source in an epoch."""
        part_of_epoch = np.cumsum(self.weights) / np.sum(self.weights)
        bounds = np.rint(part_of_epoch * sum(self.sizes)).astype(int).tolist()
        return tuple(b - a for a, b in itertools.pairwise([0, *bounds]))

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        part, own_index = self._find(index)
        return part[own_index]

    def name(self, index: int) -> str:
        part, own_index = self._find(index)
        return part.name(own_index)

    def digest(self) -> str:
        return checksum([part.digest() for part in self.parts], self.shares)

    def _find(self, index: int) -> tuple[NamedSource, int]:
        starts = [0, *itertools.accumulate(self.sizes)]
        number = bisect.bisect_right(starts, index) - 1
        return self.parts[number], index - starts[number]


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey.

    The split is fixed: `test` is every fifth image of a permutation (360 images),
    `train` the rest (1,437).
    """

    classes = tuple("0123456789")

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        check_known(f"split {split!r}", split, ("train", "test"))
        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        held_out = np.arange(len(order)) % 5 == 0
        chosen = order[held_out if split == "test" else ~held_out]
        # The grey levels are 0 to 16.
        self.images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self.labels = digits.target[chosen]
        self.where = f"digits/{split}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.images[index][:, :, None], int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.where}/{index}"

    def digest(self) -> str:
        return checksum(self.where, self.labels.tolist())


@dataclasses.dataclass(frozen=True)
class FakeSource:
    """Noise with labels, as fast as memory: for benchmarks and dry runs.

    Attributes:
      split: its name.
      shape: height, width and channels of the images.
      num_classes: number of classes.
      size: number of images; 0: as in ImageNet, so that schedules come out right.
    """

    split: str
    shape: tuple[int, int, int] = (224, 224, 3)
    num_classes: int = 1000
    size: int = 0

    def __post_init__(self):
        check_known(f"split {self.split!r}", self.split, FAKE_SIZES)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(f"class {i}" for i in range(self.num_classes))

    @property
    def where(self) -> str:
        return f"fake/{self.split}"

    def __len__(self) -> int:
        return self.size or FAKE_SIZES[self.split]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return _noise(self.shape)[index % 16], index % self.num_classes

    def name(self, index: int) -> str:
        return f"{self.where}/{index}"

    def digest(self) -> str:
        return checksum(self.where, self.num_classes, len(self))


@functools.cache
def _noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, *shape), np.uint8)


class FolderSource:
    """An image folder: `PATH/split/class/image.jpg`, classes in alphabetical order.

    Files whose names end in no known image suffix, and hidden ones, are not images.
    """

    def __init__(self, path: str, split: str):
        root = _root(path)
        check_known(f"split {split!r}", split, folder_splits(path))
        self.root = root / split
        self.where = str(self.root)
        folders = _folders(self.root)
        if not folders:
            raise UserError(
                f"{self.root} holds no class folders; a folder source is laid out as"
                f" {root}/SPLIT/CLASS/IMAGE.jpg."
            )
        self.classes = tuple(folder.name for folder in folders)
        self.paths: list[str] = []
        self.labels: list[int] = []
        for label, folder in enumerate(folders):
            names = sorted(
                entry.name
                for entry in os.scandir(folder)
                if entry.name.lower().endswith(IMAGE_SUFFIXES)
                and not entry.name.startswith(".")
            )
            if not names:
                raise UserError(
                    f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); add"
                    " some, or remove the class from every split before a run begins."
                )
            self.paths += [f"{folder.name}/{name}" for name in names]
            self.labels += [label] * len(names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            return (self.root / self.paths[index]).read_bytes(), self.labels[index]
        except OSError as error:
            raise BadImageError(
                f"{self.name(index)}: cannot be read: {error.strerror}."
            ) from None

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def digest(self) -> str:
        return checksum(self.paths, self.labels)


def folder_splits(path: str) -> list[str]:
    """Names of the splits of an image folder; raises UserError if there are none."""
    root = _root(path)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.")
    splits = [folder.name for folder in _folders(root)]
    if not splits:
        raise UserError(
            f"{root} holds no images; a folder source is laid out as"
            f" {root}/SPLIT/CLASS/IMAGE.jpg."
        )
    return splits


def _root(path: str) -> pathlib.Path:
    return storage.kept_copy(storage.path_of(path)).expanduser()


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(
        child
        for child in path.iterdir()
        if child.is_dir() and not child.name.startswith(".")
    )
