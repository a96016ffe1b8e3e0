"""Packs images into a data set that tfds opens: ArrayRecord shards and their metadata.

Shards are written one by one and moved into place when they are whole, so that an
interrupted packing goes on with those that are missing; the bytes are the same in the
end. The directory gets its name when everything is in it.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from resnet_jax.console import output
from resnet_jax.data.decode import Picture
from resnet_jax.data.shards import RECORD, damage, read_record, read_shard, write_shard
from resnet_jax.data.workers import each
from resnet_jax.errors import BadImageError, UserError

SHARD_BYTES = 2**27
# Holds what is not finished, inside the directory that is being packed.
SCRATCH = "unfinished"
Example = tf_example_pb2.Example


@runtime_checkable
class Shard(Protocol):
    """What becomes one shard; it pickles, since worker processes read it."""

    def __len__(self) -> int:
        """How many examples there are."""

    def __iter__(self) -> Iterator[bytes]:
        """Serialized `tf.Example`s; raises UserError if one cannot be read."""

    @property
    def num_bytes(self) -> int:
        """About how long the shard will be."""


@dataclasses.dataclass(frozen=True, slots=True)
class ImageFile:
    """An image file, or one that lies within an archive.

    Attributes:
      path: the file or the archive.
      start: where it starts, in bytes.
      size: its length in bytes.
      label: of the image.
      name: of the image, kept in the data set.
    """

    # An archive may be moved before a packing goes on.
    path: str = dataclasses.field(repr=False)
    start: int
    size: int
    label: int
    name: str


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """A shard of image files.

    Attributes:
      files: of the images.
      odd: names of images that become RGB JPEGs of quality 100, whatever they are.
    """

    files: tuple[ImageFile, ...]
    odd: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    @property
    def num_bytes(self) -> int:
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
      path: an ArrayRecord or a TFRecord file.
      length: how many examples are in it.
    """

    path: str
    length: int

    def __len__(self) -> int:
        return self.length

    @property
    def num_bytes(self) -> int:
        return os.path.getsize(self.path) if os.path.exists(self.path) else 0

    def __iter__(self) -> Iterator[bytes]:
        found = 0
        try:
            for record in self._records():
                if isinstance(record, RuntimeError):
                    raise record
                found += 1
                yield record
        except (ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split(":")[0].split())
            raise UserError(f"{self.path} is damaged: {reason}.") from None
        if found != self.length:
            raise UserError(
                f"{self.path} holds {found:,} examples, not {self.length:,} as its"
                " dataset_info.json says; prepare that data set again."
            )

    def _records(self) -> Iterator[bytes | RuntimeError]:
        if ".tfrecord" in pathlib.Path(self.path).name:
            # Imported here: it brings jax, which no other kind of shard needs.
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
    # The order of the features would be another one in each process.
    return example.SerializeToString(deterministic=True)


def to_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """Encodes uint8 pixels [h, w, c] as a JPEG; 4:2:0 below quality 100."""
    file = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[-1] == 1 else pixels)
    subsampling = "4:2:0" if quality < 100 else "4:4:4"
    image.save(file, "JPEG", quality=quality, subsampling=subsampling)
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class Reencode:
    """Makes images smaller, once, so that decoding them takes less time.

    Attributes:
      max_side: the longer side in pixels, at most; smaller images keep their size. 0:
        all do.
      quality: of the JPEG, 1 to 100; 4:2:0.
    """

    max_side: int
    quality: int

    def __post_init__(self):
        if self.max_side < 0:
            raise UserError(f"--max_side={self.max_side} must be at least 1 pixel.")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality={self.quality} must be from 1 to 100.")

    @property
    def note(self) -> str:
        """What to tell whoever trains on the images."""
        size = f"longer side at most {self.max_side} px, " if self.max_side else ""
        return f"re-encoded: {size}JPEG quality {self.quality}"

    @property
    def suffix(self) -> str:
        """What the name of such a data set ends in."""
        size = f"_max{self.max_side}" if self.max_side else ""
        return f"{size}_q{self.quality}"

    def image(self, content: bytes, channels: int, name: str) -> bytes:
        """Returns the smaller JPEG; raises BadImageError if there is no image."""
        pixels = Picture(content, channels, name).pixels()
        height, width = pixels.shape[:2]
        longer = max(height, width)
        if self.max_side and longer > self.max_side:
            size = [
                max(round(side * self.max_side / longer), 1) for side in (width, height)
            ]
            small = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
            small = np.asarray(small.resize(size, Image.Resampling.LANCZOS))
            pixels = small.reshape(*small.shape[:2], channels)
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
    """Writes a shard; returns why images were kept as they are."""
    kept = []

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
                    kept.append(str(error))
            yield _serialize(features)

    try:
        write_shard(job.path, records(), len(job.shard), job.scratch)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error).split(";")[0]
        raise UserError(
            f"{job.path} cannot be written ({reason}); make room, and run the same"
            " command again: it goes on with the shards that are missing."
        ) from None
    return kept


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set to be packed.

    Attributes:
      name: what it is called, in lower case with underscores.
      version: MAJOR.MINOR.PATCH.
      features: of tfds.
      splits: the shards of each split.
      about: what else the metadata say: arguments of `tfds.core.DatasetInfo`.
    """

    name: str
    version: str
    features: tfds.features.FeaturesDict
    splits: Mapping[str, Sequence[Shard]]
    about: Mapping[str, Any]

    def __len__(self) -> int:
        return sum(len(shard) for shards in self.splits.values() for shard in shards)


def image_channels(features: tfds.features.FeaturesDict) -> dict[str, int]:
    """1 (grey) or 3 for each feature that is an image."""
    return {
        key: 1 if feature.shape[-1] == 1 else 3
        for key, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }


def deal(files: Sequence[ImageFile], odd: tuple[str, ...] = ()) -> list[Shard]:
    """Deals image files at random, always in the same way, to shards of equal length.

    Slices such as `train[:10%]` are then random parts of the split. Within a shard
    files stay in order, since disks read forwards.
    """
    count = max(round(sum(file.size for file in files) / SHARD_BYTES), 1)
    order = np.random.default_rng(0).permutation(len(files))
    return [
        ImageFiles(tuple(files[index] for index in sorted(part)), odd)
        for part in np.array_split(order, count)
    ]


def work_dir(out: pathlib.Path) -> pathlib.Path:
    """Where a data set is written: beside `out` until it is whole, then there.

    Raises UserError if something else is in `out`.
    """
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
    say: Callable[[str], None] = output.say,
) -> None:
    """Writes a data set, or those of its shards that are missing.

    Args:
      data: the data set.
      out: the directory to be made; if it is there, its damaged shards are made again.
      command: the shell command that does this, if `out` is put behind it.
      reencode: makes the images smaller.
      workers: processes.
      say: tells which images were kept since they cannot be decoded.

    Raises:
      UserError: something else is in that directory, or another process works on it;
        an image cannot be read; the disk is full.
    """
    work = work_dir(out)
    with _claimed(work, data, command, reencode):
        _write_shards(data, work, reencode, workers, say)
        if work != out:
            _write_metadata(data, work, out, reencode)
    if work != out:
        work.rename(out)


def convert(
    data: DataSet, directory: pathlib.Path, *, command: str, workers: int = 1
) -> None:
    """Adds ArrayRecord files to a directory that tfds has prepared in another format.

    Arguments and errors as in `pack`; the directory stays what it was until the end.
    """
    with _claimed(directory, data, command, None):
        _write_shards(data, directory, None, workers, print)
        path = directory / "dataset_info.json"
        info = json.loads(path.read_text())
        others = set(info.get("alternativeFileFormats", []))
        info["alternativeFileFormats"] = sorted(others | {"array_record"})
        write_json(path, info)


@contextlib.contextmanager
def _claimed(
    work: pathlib.Path, data: DataSet, command: str, reencode: Reencode | None
) -> Iterator[None]:
    """Keeps other processes and other packings out of a directory."""
    # What a shard prints as says which images are in it, in every process alike.
    plan = hashlib.sha256()
    examples = hashlib.sha256()
    for split, shards in data.splits.items():
        for shard in shards:
            plan.update(f"{split} {reencode} {shard!r}\n".encode())
            # Neither sizes nor shards: the same images may be encoded again.
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
    say: Callable[[str], None],
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
            f"{needed / 1e9:,.1f} GB are to be written to {work}, and"
            f" {free / 1e9:,.1f} GB are free there; make room, or choose another disk"
            " with --out."
        )
    for kept in each(_write, jobs, workers=workers, total=len(data)):
        for why in kept:
            say(f"{why} It is kept as it is.")


def _paths(data: DataSet, split: str, directory: pathlib.Path) -> list[pathlib.Path]:
    count = len(data.splits[split])
    names = f"{data.name}-{split}.array_record-{{:05d}}-of-{count:05d}"
    return [directory / names.format(index) for index in range(count)]


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
    """Writes a JSON file whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.rename(path)
