"""Random access to the data sets of tensorflow-datasets, without TensorFlow."""

import functools
import hashlib
import json
import operator
import os
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.json_format import ParseError

from resnet_jax import paths
from resnet_jax.data.shards import damage, read_record, repair
from resnet_jax.data.splits import slices_of
from resnet_jax.errors import BadImageError, UserError, nearest
from resnet_jax.persistence import storage

# What tfds raises for metadata that are cut off or belong to something else.
_DAMAGES = (
    *(ParseError, OSError, ValueError, LookupError),
    *(TypeError, AttributeError, ImportError, AssertionError),
)

if TYPE_CHECKING:
    import tensorflow_datasets as tfds


def tfds_builder(
    dataset: str, data_dir: str = "", file_format: str | None = None
) -> "tfds.core.DatasetBuilder":
    """Returns the builder of NAME[/CONFIG], or of a directory that tfds prepared.

    Args:
      dataset: NAME[/CONFIG], or the path of a prepared data set.
      data_dir: The directory in which tfds keeps its data sets; empty for its default.
      file_format: The format in which the builder is to prepare the data set; None
        for the format in which it is prepared already.

    Raises:
      UserError: There is no such data set; the message names the nearest.
    """
    # Imported here: users and workers of other sources need not pay for it.
    import tensorflow_datasets as tfds

    dataset, data_dir = _on_disk(dataset, data_dir)
    directory = paths.local(dataset)
    if (directory / "dataset_info.json").is_file():
        return builder_of(directory)
    if dataset.startswith(("/", "~", ".")):
        raise UserError(
            f"There is no prepared data set in {directory}: it holds no"
            " dataset_info.json."
        )
    name = re.split("[/:]", dataset)[0]
    # Community data sets would be listed over the network, by TensorFlow.
    known = tfds.list_builders(with_community_datasets=False)
    try:
        builder = tfds.builder(
            dataset, data_dir=data_dir or None, file_format=file_format
        )
        if file_format or not (builder.data_path / "dataset_info.json").exists():
            return builder
        # Only the directory knows the formats that were added after its preparation.
        return builder_of(pathlib.Path(builder.data_path))
    except (ImportError, ValueError, AssertionError, ParseError, OSError) as error:
        if name in known:
            raise UserError(f"tfds:{dataset}: {reason_of_tfds(error)}") from None
        raise UserError(
            f"tfds has no data set {name!r}.{nearest(name, known)}"
        ) from None


def builder_of(directory: pathlib.Path) -> "tfds.core.DatasetBuilder":
    """Returns the builder of a directory that tfds has prepared.

    Raises:
      UserError: The directory holds no prepared data set, or its metadata are damaged.
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(directory)
        _check_class_names(builder)
    except _DAMAGES as error:
        raise UserError(
            f"{directory} is not a data set that tfds has prepared, or its metadata"
            f" are damaged: {reason_of_tfds(error)[:200]}. Run the command that"
            " prepared it again, for which a data set of tfds must be deleted first."
        ) from None
    return builder


def _check_class_names(builder: "tfds.core.DatasetBuilder") -> None:
    """Raises a ValueError if tfds has read other class names than were written.

    It then numbers other classes. Older formats of features.json do not say how many
    classes there are.
    """
    directory = pathlib.Path(builder.data_path)
    features = json.loads((directory / "features.json").read_text())
    for key, feature in features.get("featuresDict", {}).get("features", {}).items():
        count = feature.get("classLabel", {}).get("numClasses")
        if count is None:
            continue
        names = builder.info.features[key].names
        path = directory / f"{key}.labels.txt"
        lines = path.read_text().split("\n") if os.path.lexists(path) else names
        written = [line.strip() for line in lines if line.strip()]
        if written != names or int(count) != len(names):
            raise ValueError(
                f"{path.name} has {len(written)} lines, but there are {count} classes"
            )


def _on_disk(dataset: str, data_dir: str) -> tuple[str, str]:
    """Returns a data set and its data_dir as local paths, copied from a store."""
    if "://" in dataset:
        return str(storage.kept_copy(storage.path_of(dataset))), ""
    # tfds would take ~ in the variable for the name of a folder.
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR", "")
    if "://" in data_dir:
        name = dataset.partition(":")[0]
        copy = storage.kept_copy(storage.path_of(data_dir) / name)
        return dataset, str(copy.parents[name.count("/")])
    return dataset, data_dir and str(paths.local(data_dir))


class TfdsSource:
    """A split of a data set that tensorflow-datasets has prepared as ArrayRecord.

    Args:
      dataset: NAME[/CONFIG], or the directory of a prepared data set.
      split: The name of the split, or slices of splits in tfds's syntax.
      data_dir: The directory in which tfds keeps its data sets; empty for its default.
      most_labels: The largest number of labels of an image, where the data set gives
        each image a sequence of labels; 0 if each image has exactly one.

    Attributes:
      title: The name of the split in messages and summaries.
      classes: The names of the classes, in the order of the labels.
      slices: The slices of splits that make the split.

    Raises:
      UserError: The data set is unknown, not prepared, not ArrayRecord, not one of
        images with a class, or damaged; or it has no such split.
    """

    def __init__(
        self, dataset: str, split: str, data_dir: str = "", most_labels: int = 0
    ):
        self.title = f"tfds:{dataset}/{split}"
        dataset, data_dir = _on_disk(dataset, data_dir)
        self.dataset, self.split, self.data_dir = dataset, split, data_dir
        self.most_labels = most_labels
        flag = f" --data_dir={data_dir}" if data_dir else ""
        self._prepare = f"python -m resnet_jax.prepare tfds:{dataset}{flag}"
        builder = tfds_builder(dataset, data_dir)
        if not (builder.data_path / "dataset_info.json").exists():
            raise UserError(
                f"tfds:{dataset} is not prepared in {builder.data_dir}; run"
                f" `{self._prepare}` first."
            )
        self._image, self._label = self._keys(builder.info)
        labels = builder.info.features[self._label]
        self.classes = tuple((labels.feature if most_labels else labels).names)
        splits = builder.info.splits
        self.slices = slices_of(
            split, splits, lambda name: splits[name].shard_lengths, f"tfds:{dataset}"
        )
        note = read_record(builder.data_path).get("note")
        if note:
            self.title += f" ({note})"
        self._check_shards()

    def _keys(self, info) -> tuple[str, str]:
        """Returns the names of the features that are the image and the label."""
        import tensorflow_datasets as tfds

        keys = tuple(info.supervised_keys or ())
        features = [info.features[key] for key in keys]
        if self.most_labels:
            features[1:] = [getattr(kind, "feature", kind) for kind in features[1:]]
        kinds = [type(feature) for feature in features]
        if kinds != [tfds.features.Image, tfds.features.ClassLabel]:
            raise UserError(
                f"tfds:{self.dataset} does not map an image to a class, so it cannot be"
                " used for classification."
            )
        image, label = keys
        return image, label

    @functools.cached_property
    def _records(self):
        import tensorflow_datasets as tfds

        builder = tfds_builder(self.dataset, self.data_dir)
        try:
            return builder.as_data_source(
                split=self._instruction(),
                decoders={self._image: tfds.decode.SkipDecoding()},
            )
        except NotImplementedError:
            raise UserError(
                f"tfds:{self.dataset} in {builder.data_dir} is not ArrayRecord, which"
                " random access needs; run `python -m resnet_jax.prepare convert"
                f" {builder.data_dir}`."
            ) from None

    def _instruction(self):
        """Returns the slices in the form that tfds takes."""
        from tensorflow_datasets.core import ReadInstruction

        instructions = [
            ReadInstruction(name, from_=start, to=stop, unit="abs")
            for name, start, stop in self.slices
        ]
        return functools.reduce(operator.add, instructions)

    def _files(self):
        """Returns the ranges of records of the shards that make the split, in order."""
        splits = self._records.dataset_info.splits
        return splits[self._instruction()].file_instructions

    def _check_shards(self) -> None:
        """Raises a UserError if a shard is missing or has lost its end."""
        lengths = {file.filename: file.examples_in_shard for file in self._files()}
        with ThreadPoolExecutor(16) as pool:
            for path, why in zip(
                lengths, pool.map(damage, lengths, lengths.values()), strict=True
            ):
                if why:
                    raise UserError(self._damaged(path, why))

    def _damaged(self, path: str, why: str) -> str:
        return f"{path} is damaged: {why}. `{repair(path)}` writes it again."

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "_records"}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[bytes, int | np.ndarray]:
        try:
            example = self._records[index]
        # ArrayRecord raises it for wrong checksums and for errors of the disk.
        except RuntimeError as error:
            ends = np.cumsum([file.take for file in self._files()])
            file = self._files()[np.searchsorted(ends, index, side="right")]
            reason = self._damaged(file.filename, reason_of_tfds(error))
            raise BadImageError(f"{self.name(index)}: {reason}") from None
        labels = np.atleast_1d(example[self._label])
        wrong = labels[(labels < 0) | (labels >= len(self.classes))]
        if wrong.size:
            raise UserError(
                f"{self.name(index)} has the label {wrong[0]}, but labels are 0 to"
                f" {len(self.classes) - 1}; choose a split whose labels are known, or"
                f" prepare the data set again: `{self._prepare}`."
            )
        if not self.most_labels:
            return example[self._image], int(labels[0])
        if len(labels) > self.most_labels:
            raise UserError(
                f"{self.name(index)} has {len(labels)} labels, more than the"
                f" {self.most_labels} that an image of {self.dataset} should have."
            )
        padding = (0, self.most_labels - len(labels))
        return example[self._image], np.pad(labels, padding, constant_values=-1)

    def name(self, index: int) -> str:
        """Returns the name of an example, by its place in the complete split."""
        for split, start, stop in self.slices:
            if index < stop - start:
                return f"tfds:{self.dataset}/{split}[{start + index}]"
            index -= stop - start
        raise IndexError(f"{self.title} has {len(self):,} images.")

    def digest(self) -> str:
        """Returns a checksum of the data set's name and version, and of the split.

        Names and labels are not read, since they lie in the records, beside the images.
        A data set that this project packed has a checksum of both in its directory.
        """
        info = self._records.dataset_info
        packed = read_record(pathlib.Path(info.data_dir)).get("examples", "")
        facts = [info.full_name, self.split, len(self), packed]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def reason_of_tfds(error: Exception) -> str:
    """Returns an error's message in one line, without the arguments of the call."""
    text = " ".join(str(error).split()).rstrip(".")
    return re.sub(r'^Failed to construct dataset .*?}": ', "", text)
