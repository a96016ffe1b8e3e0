"""Reads and decodes every image of a data set, and reports the problems."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from resnet_jax.data.csv_source import CsvSource
from resnet_jax.data.decode import Picture
from resnet_jax.data.folder_source import FolderSource
from resnet_jax.data.prepare.pack import image_channels
from resnet_jax.data.shards import damage, read_shard, repair
from resnet_jax.data.workers import map_unordered
from resnet_jax.errors import UserError

# The number of image files that a worker checks at once.
CHUNK = 256


@dataclasses.dataclass(frozen=True)
class ShardCheck:
    """One shard of a prepared data set.

    Attributes:
      path: The path of an ArrayRecord file.
      length: The expected number of examples.
      channels: The number of channels of each feature that is an image.
      classes: The number of classes of each feature that is a label.
      max_pixels: The number of pixels beyond which an image cannot be decoded.
    """

    path: str
    length: int
    channels: Mapping[str, int]
    classes: Mapping[str, int]
    max_pixels: int

    def __len__(self) -> int:
        return self.length

    def problems(self) -> Iterator[str]:
        """Yields a line for each problem."""
        path = pathlib.Path(self.path)
        advice = f"`{repair(path)}` writes it again."
        if why := damage(path, self.length):
            yield f"{path}: {why}. {advice}"
            return
        for index, record in enumerate(read_shard(path)):
            name = f"{path}[{index}]"
            if isinstance(record, RuntimeError):
                why = str(record).split(";")[0].split(",")[0]
                yield f"{name}: cannot be read: {why}. {advice}"
                continue
            yield from self._example(record, name)

    def _example(self, record: bytes, name: str) -> Iterator[str]:
        features = tf_example_pb2.Example.FromString(record).features.feature
        if file_names := features["file_name"].bytes_list.value:
            name += f" ({file_names[0].decode(errors='replace')})"
        for key, channels in self.channels.items():
            contents = features[key].bytes_list.value
            if not contents:
                yield f"{name}: has no {key}."
            for content in contents:
                try:
                    Picture(content, channels, name, self.max_pixels).pixels()
                except UserError as error:
                    yield str(error)
        for key, classes in self.classes.items():
            labels = features[key].int64_list.value
            if not labels:
                yield f"{name}: has no {key}."
            for label in labels:
                if not 0 <= label < classes:
                    yield f"{name}: {key} {label} is not one of the {classes} classes."


@dataclasses.dataclass(frozen=True)
class FilesCheck:
    """Some image files.

    Attributes:
      paths: The paths of the files.
      max_pixels: The number of pixels beyond which an image cannot be decoded.
    """

    paths: tuple[str, ...]
    max_pixels: int

    def __len__(self) -> int:
        return len(self.paths)

    def problems(self) -> Iterator[str]:
        """Yields a line for each problem."""
        for path in self.paths:
            try:
                content = pathlib.Path(path).read_bytes()
                Picture(content, 3, path, self.max_pixels).pixels()
            except UserError as error:
                yield str(error)
            except OSError as error:
                yield f"{path}: cannot be read: {error.strerror}."


def checks_of_builder(
    builder: tfds.core.DatasetBuilder, max_pixels: int
) -> list[ShardCheck]:
    """Returns a check for each shard of a prepared data set of tfds.

    Raises:
      UserError: There are no ArrayRecord files, or no images.
    """
    info = builder.info
    if tfds.core.FileFormat.ARRAY_RECORD not in info.available_file_formats():
        raise UserError(
            f"{builder.data_path} is not ArrayRecord; run `python -m resnet_jax.prepare"
            f" convert {builder.data_path}` first."
        )
    info.set_file_format("array_record", override=True, override_if_initialized=True)
    features = info.features
    channels = image_channels(features)
    if not channels:
        raise UserError(f"{builder.data_path} holds no images.")
    classes = {
        key: feature.num_classes
        for key, feature in features.items()
        if isinstance(feature, tfds.features.ClassLabel)
    }
    return [
        ShardCheck(str(path), length, channels, classes, max_pixels)
        for split in info.splits.values()
        for path, length in zip(split.filepaths, split.shard_lengths, strict=True)
    ]


def checks_of_files(
    source: FolderSource | CsvSource, max_pixels: int
) -> list[FilesCheck]:
    """Returns the checks of a split of image files, each of several files."""
    paths = [source.name(index) for index in range(len(source))]
    return [
        FilesCheck(tuple(paths[start : start + CHUNK]), max_pixels)
        for start in range(0, len(paths), CHUNK)
    ]


def verify(checks: Sequence[ShardCheck | FilesCheck], workers: int) -> Iterator[str]:
    """Yields a line for each problem, in any order, and shows the progress."""
    total = sum(map(len, checks))
    for problems in map_unordered(_problems, checks, workers=workers, total=total):
        yield from problems


def _problems(check: ShardCheck | FilesCheck) -> list[str]:
    return list(check.problems())
