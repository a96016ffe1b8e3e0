"""Where examples come from: random access to (image, label), whatever the storage.

A source is named by a string: `tfds:NAME[/CONFIG]`, `tfds:DIRECTORY`, `folder:PATH`,
`digits` or `fake[:CLASSES[:SIZE]]`. All of them pickle small, since worker processes
open them again.
"""

import dataclasses
import functools
import os
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np

from resnet_jax.data.shards import damage, read_record, repair
from resnet_jax.errors import BadImageError, UserError, nearest

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif"),
    *(".webp", ".ppm", ".pgm", ".tif", ".tiff"),
)
FAKE_SIZES = {"train": 1_281_167, "validation": 50_000, "test": 50_000}
KINDS = (
    *("tfds:NAME[/CONFIG]", "tfds:DIRECTORY", "folder:PATH", "digits"),
    "fake[:CLASSES[:SIZE]]",
)


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split.

    Attributes:
      classes: names of the classes, in the order of the labels.
      where: what to call the split in a message.
    """

    classes: tuple[str, ...]
    where: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        """Returns an encoded image, or uint8[h, w, c] pixels, and its label."""

    def name(self, index: int) -> str:
        """What to call the example in a message."""


def open_source(
    source: str, split: str, *, data_dir: str = "", fake_shape=(224, 224, 3)
) -> Source:
    """Opens one split of a data set.

    Args:
      source: `tfds:NAME[/CONFIG]`, `tfds:DIRECTORY` (of a prepared data set),
        `folder:PATH`, `digits` or `fake[:CLASSES[:SIZE]]`.
      split: name of the split; tfds's slicing syntax (`train[:10%]`) for `tfds:`.
      data_dir: where tfds keeps its data sets; empty: tfds's default.
      fake_shape: height, width and channels of the images of `fake`.

    Raises:
      UserError: unknown source or split, a data set that is not prepared, a folder
        without images or with other classes than its sibling splits.
    """
    kind, _, rest = source.partition(":")
    if kind == "tfds" and rest:
        return TfdsSource(rest, split, data_dir)
    if kind == "folder" and rest:
        return FolderSource(rest, split)
    if source == "digits":
        return DigitsSource(split)
    if re.fullmatch("fake(:[1-9][0-9]*(:[0-9]+)?)?", source):
        numbers = [int(number) for number in rest.split(":") if rest]
        return FakeSource(split, tuple(fake_shape), *numbers)
    hint = nearest(kind, ("tfds", "folder", "digits", "fake"))
    raise UserError(
        f"There is no data source {source!r}.{hint} A source is written"
        f" {', '.join(KINDS)}."
    )


def check_same_classes(train: Source, test: Source) -> None:
    """Raises UserError unless both splits number the same classes in the same way."""
    for source, other in ((train, test), (test, train)):
        missing = sorted(set(source.classes) - set(other.classes))
        if missing:
            raise UserError(
                f"Class {missing[0]!r} is in {source.where} but not in"
                f" {other.where}, so labels would differ; add it to both splits or"
                " remove it from both."
            )


def _check_split(split: str, known) -> None:
    if split not in known:
        raise UserError(f"There is no split {split!r}.{nearest(split, known)}")


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey.

    The split is fixed: `test` is every fifth image of a permutation (360 images),
    `train` the rest (1,437).
    """

    classes = tuple("0123456789")

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        _check_split(split, ("train", "test"))
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
        _check_split(self.split, FAKE_SIZES)

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


@functools.cache
def _noise(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, *shape), np.uint8)


class FolderSource:
    """An image folder: `PATH/split/class/image.jpg`, classes in alphabetical order.

    Files whose names end in no known image suffix, and hidden ones, are not images.
    """

    def __init__(self, path: str, split: str):
        root = pathlib.Path(path).expanduser()
        if not root.is_dir():
            raise UserError(f"There is no folder {root}.")
        splits = [folder.name for folder in _folders(root)]
        if not splits:
            raise UserError(
                f"{root} holds no images; a folder source is laid out as"
                f" {root}/SPLIT/CLASS/IMAGE.jpg."
            )
        _check_split(split, splits)
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
                    f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); add some"
                    " or remove the class from every split."
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


def _folders(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(
        child
        for child in path.iterdir()
        if child.is_dir() and not child.name.startswith(".")
    )


def tfds_builder(dataset: str, data_dir: str = "", file_format: str | None = None):
    """The builder that tfds has for NAME[/CONFIG], or of a prepared directory.

    Raises UserError with the nearest names if there is none.
    """
    # Imported here: users and workers of other sources need not pay for it.
    import tensorflow_datasets as tfds

    directory = pathlib.Path(dataset).expanduser()
    if (directory / "dataset_info.json").is_file():
        return tfds.builder_from_directory(directory)
    if dataset.startswith(("/", "~", ".")):
        raise UserError(
            f"There is no prepared data set in {directory}: it holds no"
            " dataset_info.json."
        )
    name = re.split("[/:]", dataset)[0]
    # Community data sets would be listed over the network, by TensorFlow.
    known = tfds.list_builders(with_community_datasets=False)
    try:
        return tfds.builder(dataset, data_dir=data_dir or None, file_format=file_format)
    except (ImportError, ValueError, AssertionError) as error:
        if name in known:
            raise UserError(f"tfds:{dataset}: {_reason(error)}") from None
        raise UserError(
            f"tfds has no data set {name!r}.{nearest(name, known)}"
        ) from None


class TfdsSource:
    """A data set prepared by tensorflow-datasets as ArrayRecord, read without TF."""

    def __init__(self, dataset: str, split: str, data_dir: str = ""):
        self.dataset, self.split, self.data_dir = dataset, split, data_dir
        self.where = f"tfds:{dataset}/{split}"
        where = f" --data_dir={data_dir}" if data_dir else ""
        self._prepare = f"python -m resnet_jax.prepare tfds:{dataset}{where}"
        builder = tfds_builder(dataset, data_dir)
        if not (builder.data_path / "dataset_info.json").exists():
            raise UserError(
                f"tfds:{dataset} is not prepared in {builder.data_dir}; run"
                f" `{self._prepare}` first."
            )
        self._image, self._label = self._keys(builder.info)
        self.classes = tuple(builder.info.features[self._label].names)
        known = [*builder.info.splits, "all"]
        for part in split.split("+"):
            _check_split(part.split("[")[0].strip(), known)
        note = read_record(builder.data_path).get("note")
        if note:
            self.where += f" ({note})"
        self._check_shards()

    def _keys(self, info) -> tuple[str, str]:
        """The names of the features that are the image and the label."""
        import tensorflow_datasets as tfds

        keys = info.supervised_keys or ()
        kinds = [type(info.features[key]) for key in keys]
        if kinds != [tfds.features.Image, tfds.features.ClassLabel]:
            raise UserError(
                f"tfds:{self.dataset} does not map an image to a class, so it cannot be"
                " used for classification."
            )
        return keys

    @functools.cached_property
    def _records(self):
        import tensorflow_datasets as tfds

        builder = tfds_builder(self.dataset, self.data_dir)
        try:
            return builder.as_data_source(
                split=self.split, decoders={self._image: tfds.decode.SkipDecoding()}
            )
        except NotImplementedError:
            raise UserError(
                f"tfds:{self.dataset} in {builder.data_dir} is not ArrayRecord, which"
                " random access needs; run `python -m resnet_jax.prepare convert"
                f" {builder.data_dir}`."
            ) from None
        except (ValueError, AssertionError) as error:
            raise UserError(f"{self.where}: {_reason(error)}") from None

    def _files(self):
        """Which records of which shards the split is made of, in order."""
        return self._records.dataset_info.splits[self.split].file_instructions

    def _check_shards(self) -> None:
        """Raises UserError if a shard is missing or has lost its end."""
        lengths = {file.filename: file.examples_in_shard for file in self._files()}
        with ThreadPoolExecutor(16) as pool:
            for path, why in zip(
                lengths, pool.map(damage, lengths, lengths.values()), strict=True
            ):
                if why:
                    raise UserError(self._damaged(path, why))

    def _damaged(self, path: str, why: str) -> str:
        command = repair(os.path.dirname(path), path, self._prepare)
        return f"{path} is damaged: {why}. `{command}` writes it again."

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "_records"}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        try:
            example = self._records[index]
        except RuntimeError as error:  # ArrayRecord's, of a checksum and of the disk
            ends = np.cumsum([file.take for file in self._files()])
            file = self._files()[np.searchsorted(ends, index, side="right")]
            raise BadImageError(
                f"{self.name(index)}: {self._damaged(file.filename, _reason(error))}"
            ) from None
        return example[self._image], int(example[self._label])

    def name(self, index: int) -> str:
        return f"tfds:{self.dataset}/{self.split}[{index}]"


def _reason(error: Exception) -> str:
    """What tfds says, in one line and without the arguments of the call."""
    text = " ".join(str(error).split())
    return re.sub(r'^Failed to construct dataset .*?}": ', "", text)
