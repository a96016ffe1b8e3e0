"""Data sets of tensorflow-datasets, random access to them without TensorFlow."""

import functools
import hashlib
import json
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from resnet_jax.data.shards import damage, read_record, repair
from resnet_jax.errors import BadImageError, UserError, check_known, nearest
from resnet_jax.persistence import storage


def tfds_builder(dataset: str, data_dir: str = "", file_format: str | None = None):
    """The builder that tfds has for NAME[/CONFIG], or of a prepared directory.

    Raises UserError with the nearest names if there is none.
    """
    # Imported here: users and workers of other sources need not pay for it.
    import tensorflow_datasets as tfds

    dataset, data_dir = _on_disk(dataset, data_dir)
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
        builder = tfds.builder(
            dataset, data_dir=data_dir or None, file_format=file_format
        )
        if file_format or not (builder.data_path / "dataset_info.json").exists():
            return builder
        # As it was prepared; it alone knows of formats that were added later.
        return tfds.builder_from_directory(builder.data_path)
    except (ImportError, ValueError, AssertionError) as error:
        if name in known:
            raise UserError(f"tfds:{dataset}: {reason_of_tfds(error)}") from None
        raise UserError(
            f"tfds has no data set {name!r}.{nearest(name, known)}"
        ) from None


def _on_disk(dataset: str, data_dir: str) -> tuple[str, str]:
    """Where a data set of tfds is on this host, after it was copied from a store."""
    if "://" in dataset:
        return str(storage.kept_copy(storage.path_of(dataset))), ""
    if "://" in data_dir:
        name = dataset.partition(":")[0]
        copy = storage.kept_copy(storage.path_of(data_dir) / name)
        return dataset, str(copy.parents[name.count("/")])
    return dataset, data_dir


class TfdsSource:
    """A data set prepared by tensorflow-datasets as ArrayRecord, read without TF.

    Args:
      dataset: NAME[/CONFIG].
      split: in tfds's syntax.
      data_dir: where tfds keeps its data sets; empty: tfds's default.
      most_labels: how many labels an image may have, where the data set gives each a
        sequence of them; 0: each image has exactly one.
    """

    def __init__(
        self, dataset: str, split: str, data_dir: str = "", most_labels: int = 0
    ):
        self.where = f"tfds:{dataset}/{split}"
        dataset, data_dir = _on_disk(dataset, data_dir)
        self.dataset, self.split, self.data_dir = dataset, split, data_dir
        self.most_labels = most_labels
        where = f" --data_dir={data_dir}" if data_dir else ""
        self._prepare = f"python -m resnet_jax.prepare tfds:{dataset}{where}"
        builder = tfds_builder(dataset, data_dir)
        if not (builder.data_path / "dataset_info.json").exists():
            raise UserError(
                f"tfds:{dataset} is not prepared in {builder.data_dir}; run"
                f" `{self._prepare}` first."
            )
        self._image, self._label = self._keys(builder.info)
        labels = builder.info.features[self._label]
        self.classes = tuple((labels.feature if most_labels else labels).names)
        known = [*builder.info.splits, "all"]
        for part in split.split("+"):
            name = part.split("[")[0].strip()
            check_known(f"split {name!r}", name, known)
        note = read_record(builder.data_path).get("note")
        if note:
            self.where += f" ({note})"
        self._check_shards()
        if not len(self):
            raise UserError(f"{self.where} holds no image.")

    def _keys(self, info) -> tuple[str, str]:
        """The names of the features that are the image and the label."""
        import tensorflow_datasets as tfds

        keys = info.supervised_keys or ()
        features = [info.features[key] for key in keys]
        if self.most_labels:
            features[1:] = [getattr(kind, "feature", kind) for kind in features[1:]]
        kinds = [type(feature) for feature in features]
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
            raise UserError(f"{self.where}: {reason_of_tfds(error)}") from None

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
        return f"{path} is damaged: {why}. `{repair(path)}` writes it again."

    def __getstate__(self):
        return {key: value for key, value in vars(self).items() if key != "_records"}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[bytes, int | np.ndarray]:
        try:
            example = self._records[index]
        except RuntimeError as error:  # ArrayRecord's, of a checksum and of the disk
            ends = np.cumsum([file.take for file in self._files()])
            file = self._files()[np.searchsorted(ends, index, side="right")]
            told = self._damaged(file.filename, reason_of_tfds(error))
            raise BadImageError(f"{self.name(index)}: {told}") from None
        labels = np.atleast_1d(example[self._label])
        wrong = labels[(labels < 0) | (labels >= len(self.classes))]
        if wrong.size:
            raise UserError(
                f"{self.name(index)} has the label {wrong[0]}, but labels are 0 to"
                f" {len(self.classes) - 1}; choose a split whose labels are known, or"
                f" prepare the data set anew: `{self._prepare}`."
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
        return f"tfds:{self.dataset}/{self.split}[{index}]"

    def digest(self) -> str:
        """Returns a checksum of the data set's name and version, and of the split.

        The records hold names and labels beside the images, so they are not read. What
        this project packed itself has a checksum of both.
        """
        info = self._records.dataset_info
        packed = read_record(pathlib.Path(info.data_dir)).get("examples", "")
        facts = [info.full_name, self.split, len(self), packed]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def reason_of_tfds(error: Exception) -> str:
    """What tfds says, in one line and without the arguments of the call."""
    text = " ".join(str(error).split())
    return re.sub(r'^Failed to construct dataset .*?}": ', "", text)
