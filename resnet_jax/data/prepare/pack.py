"""Packs images into a data set that tfds opens: ArrayRecord shards and their metadata.

Shards are written one by one and moved into place when they are complete. An
interrupted packing continues with the missing shards, and ends with the same bytes. The
directory gets its name when everything is in it.

Paths are `pathlib`'s: ArrayRecord and file locks need a local file system.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from resnet_jax.config.defaults import MAX_PIXELS
from resnet_jax.console import output
from resnet_jax.data.decode import Picture
from resnet_jax.data.image_ops import to_image, to_pixels
from resnet_jax.data.shards import (
    RECORD,
    check_path,
    damage,
    read_record,
    read_shard,
    write_shard,
)
from resnet_jax.data.tfds_source import builder_of
from resnet_jax.data.workers import map_unordered
from resnet_jax.errors import BadImageError, UserError
from resnet_jax.persistence import storage

# The approximate size of a shard.
SHARD_BYTES = 2**27
# The subdirectory of unfinished files in a directory that is being packed.
SCRATCH = "unfinished"
Example = tf_example_pb2.Example


@runtime_checkable
class Shard(Protocol):
    """The content of one shard, which pickles, since worker processes read it.

    Its repr must be the same in every process and version: a checksum of it tells
    whether a packing resumes the same one.
    """

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def __iter__(self) -> Iterator[bytes]:
        """Yields serialized `tf.Example`s; raises UserError if one cannot be read."""
        ...

    @property
    def num_bytes(self) -> int:
        """The approximate size of the shard in bytes."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file, alone or within an archive.

    Attributes:
      path: The path of the file or of the archive.
      start: The offset of the image in that file, in bytes.
      size: The size of the image in bytes.
      label: The label of the image.
      name: The name of the image, which the data set keeps.
    """

    # It is not in the repr, since an archive may be moved before a packing is resumed.
    path: str = dataclasses.field(repr=False)
    start: int
    size: int
    label: int
    name: str


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """A shard of image files.

    Attributes:
      files: The image files.
      odd: The names of images that are converted to RGB JPEGs of quality 100, as tfds
        does with CMYK and PNG files of ImageNet.
    """

    files: tuple[ImageFile, ...]
    odd: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_bytes(self) -> int:
        """The size of all files in bytes."""
        return sum(file.size for file in self.files)

    def __iter__(self) -> Iterator[bytes]:
        for file in self.files:
            image = _read(file)
            if file.name in self.odd:
                image = to_jpeg(Picture(image, 3, file.name).pixels(), quality=100)
            yield _serialize(
                {
                    "image": _bytes(image),
                    "label": tf_feature_pb2.Feature(
                        int64_list=tf_feature_pb2.Int64List(value=[file.label])
                    ),
                    "file_name": _bytes(file.name.encode()),
                }
            )


@dataclasses.dataclass(frozen=True)
class PreparedFile:
    """A shard of a data set that tfds has prepared.

    Attributes:
      path: The path of an ArrayRecord or a TFRecord file.
      length: The number of examples in it.
    """

    path: str
    length: int

    def __len__(self) -> int:
        return self.length

    @property
    def num_bytes(self) -> int:
        """The size of the file in bytes; 0 if it is missing."""
        return os.path.getsize(self.path) if os.path.exists(self.path) else 0

    def __iter__(self) -> Iterator[bytes]:
        count = 0
        try:
            for record in self._records():
                if isinstance(record, RuntimeError):
                    raise record
                count += 1
                yield record
        except (ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split(":")[0].split())
            raise UserError(f"{self.path} is damaged: {reason}.") from None
        if count != self.length:
            raise UserError(
                f"{self.path} holds {count:,} examples, not {self.length:,} as its"
                " dataset_info.json says; prepare that data set again."
            )

    def _records(self) -> Iterator[bytes | RuntimeError]:
        if ".tfrecord" in pathlib.Path(self.path).name:
            # Imported here, since it imports jax, which no other kind of shard needs.
            import grain

            return iter(grain.experimental.TFRecordIterDataset(self.path))
        return read_shard(pathlib.Path(self.path))


def _read(file: ImageFile) -> bytes:
    try:
        with open(file.path, "rb") as stream:
            stream.seek(file.start)
            content = stream.read(file.size)
    except OSError as error:
        raise UserError(f"{file.path} cannot be read: {error.strerror}.") from None
    if len(content) != file.size:
        raise UserError(
            f"{file.path} has become shorter while {file.name} was read from it; run"
            " the same command again."
        )
    return content


def _bytes(content: bytes) -> tf_feature_pb2.Feature:
    return tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[content]))


def _serialize(features: Mapping[str, tf_feature_pb2.Feature]) -> bytes:
    example = Example(features=tf_feature_pb2.Features(feature=features))
    # Otherwise the order of the features would differ between processes.
    return example.SerializeToString(deterministic=True)


def to_jpeg(pixels: UInt8[np.ndarray, "h w c"], quality: int) -> bytes:
    """Encodes pixels as a JPEG, with 4:2:0 subsampling below quality 100."""
    file = io.BytesIO()
    subsampling = "4:2:0" if quality < 100 else "4:4:4"
    to_image(pixels).save(file, "JPEG", quality=quality, subsampling=subsampling)
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Reencode:
    """Re-encoding of images as smaller JPEGs, so that decoding them takes less time.

    Attributes:
      max_side: The largest length of the longer side in pixels; smaller images keep
        their size. 0 for no limit.
      quality: The quality of the JPEGs, 1 to 100, with 4:2:0 subsampling.
      max_pixels: The number of pixels beyond which an image cannot be decoded.
    """

    max_side: int
    quality: int
    max_pixels: int = MAX_PIXELS

    def __post_init__(self):
        if self.max_side < 0:
            raise UserError(f"--max_side={self.max_side} must be at least 1 pixel.")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality={self.quality} must be from 1 to 100.")

    @property
    def note(self) -> str:
        """The note on the re-encoding that is shown to users of the data set."""
        size = f"longer side at most {self.max_side} px, " if self.max_side else ""
        return f"re-encoded: {size}JPEG quality {self.quality}"

    @property
    def suffix(self) -> str:
        """The end of the name of the re-encoded data set."""
        size = f"_max{self.max_side}" if self.max_side else ""
        return f"{size}_q{self.quality}"

    def image(self, content: bytes, channels: int, name: str) -> bytes:
        """Returns the image as a JPEG; raises BadImageError if it cannot be decoded."""
        pixels = Picture(content, channels, name, self.max_pixels).pixels()
        height, width = pixels.shape[:2]
        longer = max(height, width)
        if self.max_side and longer > self.max_side:
            wide, high = (
                max(round(side * self.max_side / longer), 1) for side in (width, height)
            )
            resample = Image.Resampling.LANCZOS
            pixels = to_pixels(to_image(pixels).resize((wide, high), resample))
        return to_jpeg(pixels, self.quality)


@dataclasses.dataclass(frozen=True)
class _Job:
    """One shard to write."""

    shard: Shard
    path: pathlib.Path
    scratch: pathlib.Path
    reencode: Reencode | None
    channels: Mapping[str, int]

    def __len__(self) -> int:
        return len(self.shard)


def _write(job: _Job) -> list[str]:
    """Writes a shard; returns the reasons why images were not re-encoded."""
    reasons = []

    def records() -> Iterator[bytes]:
        for index, record in enumerate(job.shard):
            if job.reencode is None:
                yield record
                continue
            features = dict(Example.FromString(record).features.feature)
            for key, channels in job.channels.items():
                name = f"{job.path.name}[{index}]"
                content = features[key].bytes_list.value[0]
                try:
                    features[key] = _bytes(job.reencode.image(content, channels, name))
                except BadImageError as error:
                    reasons.append(str(error))
            yield _serialize(features)

    try:
        write_shard(job.path, records(), len(job.shard), job.scratch)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).split(";")[0]
        raise UserError(
            f"{job.path} cannot be written ({reason}); make room, and run the same"
            " command again: it continues with the missing shards."
        ) from None
    return reasons


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set to be packed.

    Attributes:
      name: The name, in lower case with underscores.
      version: The version, MAJOR.MINOR.PATCH.
      features: The features, as in the metadata of tfds.
      splits: The shards of each split.
      about: The rest of the metadata, as arguments of `tfds.core.DatasetInfo`.
    """

    name: str
    version: str
    features: tfds.features.FeaturesDict
    splits: Mapping[str, Sequence[Shard]]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return sum(len(shard) for shards in self.splits.values() for shard in shards)


def image_channels(features: tfds.features.FeaturesDict) -> dict[str, int]:
    """Returns the number of channels, 1 or 3, of each feature that is an image."""
    return {
        key: 1 if feature.shape[-1] == 1 else 3
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }


def deal(
    files: Sequence[ImageFile],
    odd: tuple[str, ...] = (),
    shard_bytes: int = SHARD_BYTES,
) -> list[Shard]:
    """Deals image files to shards of equal length, at random with a fixed seed.

    Slices such as `train[:10%]` are then random parts of the split. Within a shard
    files stay in order, so that they are read from the disk in order.

    Args:
      files: The image files of a split.
      odd: The names of images that are converted, see `ImageFiles`.
      shard_bytes: The approximate size of a shard.
    """
    count = max(round(sum(file.size for file in files) / shard_bytes), 1)
    order = np.random.default_rng(0).permutation(len(files))
    return [
        ImageFiles(tuple(files[index] for index in sorted(part)), odd)
        for part in np.array_split(order, count)
    ]


def work_dir(out: pathlib.Path) -> pathlib.Path:
    """Returns the directory in which a data set is written.

    It is beside `out` until the data set is complete; then it is `out`.

    Raises:
      UserError: `out` holds something else, or its path is not UTF-8.
    """
    check_path(out)
    if not out.exists():
        return out.with_name(f"{out.name}.incomplete")
    if not read_record(out):
        raise UserError(
            f"{out} is there already, and was not made by this command; choose another"
            " place with --out, or delete it (TFRecords of tfds become ArrayRecord by"
            f" `python -m resnet_jax.prepare convert {out}`)."
        )
    return out


def pack(
    data: DataSet,
    out: pathlib.Path,
    *,
    command: str,
    reencode: Reencode | None = None,
    workers: int = 1,
) -> None:
    """Writes a data set, or those of its shards that are missing.

    Prints the names of images that are not re-encoded, as they cannot be decoded.

    Args:
      data: The data set.
      out: The directory to write; if it exists, its damaged shards and metadata are
        written again.
      command: The shell command that does the same when `out` is appended to it.
      reencode: The re-encoding of the images; None to keep the files as they are.
      workers: The number of processes.

    Raises:
      UserError: The directory holds something else, another process is writing it, an
        image cannot be read, or the disk is full.
    """
    work = work_dir(out)
    with _claimed(work, data, command, reencode):
        _write_shards(data, work, reencode, workers)
        if work != out or _has_damaged_metadata(out):
            _write_metadata(data, work, out, reencode)
    if work != out:
        work.rename(out)
        storage.sync(out.parent)


def convert(
    data: DataSet, directory: pathlib.Path, *, command: str, workers: int = 1
) -> None:
    """Adds ArrayRecord files to a directory that tfds has prepared in another format.

    The directory keeps its metadata, and so its format, until all shards are written.

    Args:
      data: The data set of that directory.
      directory: The directory.
      command: The shell command that does the same when `directory` is appended to it.
      workers: The number of processes.

    Raises:
      UserError: Another process is writing the directory, a shard is damaged, or the
        disk is full.
    """
    with _claimed(directory, data, command, None):
        _write_shards(data, directory, None, workers)
        path = directory / "dataset_info.json"
        info = json.loads(path.read_text())
        formats = set(info.get("alternativeFileFormats", []))
        info["alternativeFileFormats"] = sorted(formats | {"array_record"})
        write_json(path, info)


@contextlib.contextmanager
def _claimed(
    work: pathlib.Path, data: DataSet, command: str, reencode: Reencode | None
) -> Iterator[None]:
    """Keeps other processes and other packings out of a directory."""
    # The repr of a shard identifies its images.
    plan = hashlib.sha256()
    examples = hashlib.sha256()
    for split, shards in data.splits.items():
        for shard in shards:
            plan.update(f"{split} {reencode} {shard!r}\n".encode())
            # Without sizes and shards: the same images may be re-encoded.
            for file in getattr(shard, "files", ()):
                examples.update(f"{split} {file.name!r} {file.label}\n".encode())
    before = read_record(work)
    if before and before["plan"] != plan.hexdigest():
        raise UserError(
            f"{work} was written from other images or with other options, by"
            f" `{before['command']}...`; delete it or choose another --out."
        )
    scratch = work / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another process is writing {work}.") from None
        note = reencode.note if reencode else ""
        record = {
            "command": command,
            "note": note,
            "plan": plan.hexdigest(),
            "examples": examples.hexdigest(),
        }
        write_json(work / RECORD, record)
        for path in scratch.glob("*array_record*"):
            path.unlink()
        yield
    shutil.rmtree(scratch)


def _write_shards(
    data: DataSet,
    work: pathlib.Path,
    reencode: Reencode | None,
    workers: int,
) -> None:
    jobs = [
        _Job(shard, path, work / SCRATCH, reencode, image_channels(data.features))
        for split, shards in data.splits.items()
        for shard, path in zip(shards, _paths(data, split, work), strict=True)
        if damage(path, len(shard))
    ]
    needed = sum(job.shard.num_bytes for job in jobs)
    free = shutil.disk_usage(work).free
    if needed > free and reencode is None:
        raise UserError(
            f"{needed / 1e9:,.1f} GB are to be written to {work}, and only"
            f" {free / 1e9:,.1f} GB are free there; make room, or choose another disk"
            " with --out."
        )
    for reasons in map_unordered(_write, jobs, workers=workers, total=len(data)):
        for reason in reasons:
            output.say(f"{reason} It is kept as it is.")


def _paths(data: DataSet, split: str, directory: pathlib.Path) -> list[pathlib.Path]:
    count = len(data.splits[split])
    names = f"{data.name}-{split}.array_record-{{:05d}}-of-{count:05d}"
    return [directory / names.format(index) for index in range(count)]


def _has_damaged_metadata(out: pathlib.Path) -> bool:
    try:
        builder_of(out)
    except UserError:
        return True
    return False


def _write_metadata(
    data: DataSet, work: pathlib.Path, out: pathlib.Path, reencode: Reencode | None
) -> None:
    features = data.features
    if reencode:
        smaller = {
            key: tfds.features.Image(
                shape=(None, None, channels), encoding_format="jpeg"
            )
            for key, channels in image_channels(data.features).items()
        }
        features = tfds.features.FeaturesDict({**features, **smaller})
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=data.name,
        version=tfds.core.Version(data.version),
        data_dir=str(out),
        module_name="",
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, **data.about)
    info.set_file_format("array_record")
    template = tfds.core.ShardedFileTemplate(
        data_dir=out, dataset_name=data.name, filetype_suffix="array_record"
    )
    info.set_splits(
        tfds.core.splits.SplitDict(
            [
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[len(shard) for shard in shards],
                    num_bytes=sum(
                        path.stat().st_size for path in _paths(data, split, work)
                    ),
                    filename_template=template,
                )
                for split, shards in data.splits.items()
            ]
        )
    )
    info.write_to_directory(work)


def write_json(path: pathlib.Path, content: dict | list) -> None:
    """Writes a JSON file completely or not at all."""
    storage.write(path, storage.to_json(content, indent=1) + "\n")
