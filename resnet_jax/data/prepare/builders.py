"""Prepares data sets as ArrayRecord: from archives, folders, TFRecords or by tfds."""

import dataclasses
import pathlib
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from resnet_jax.config.defaults import MAX_PIXELS
from resnet_jax.data.csv_source import CsvSource, csv_splits
from resnet_jax.data.folder_source import FolderSource, folder_splits
from resnet_jax.data.image_files import describe
from resnet_jax.data.prepare import originals, pack
from resnet_jax.data.prepare.pack import DataSet, Reencode
from resnet_jax.data.prepare.verify import (
    FilesCheck,
    ShardCheck,
    checks_of_builder,
    checks_of_files,
    verify,
)
from resnet_jax.data.tfds_source import builder_of, tfds_builder
from resnet_jax.errors import UserError
from resnet_jax.persistence import storage

PROGRAM = "python -m resnet_jax.prepare"
ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD


def build(dataset: str, data_dir: str = "", manual_dir: str = "") -> pathlib.Path:
    """Prepares a data set of tfds with its builder.

    Args:
      dataset: NAME[/CONFIG].
      data_dir: The directory in which tfds keeps its data sets; empty for its default.
      manual_dir: The directory of files that are not downloaded.

    Returns:
      The directory of the prepared data set.

    Raises:
      UserError: The data set is unknown, a package is missing, or the files cannot be
        had.
    """
    prepared = tfds_builder(dataset, data_dir)
    path = pathlib.Path(prepared.data_path)
    if (path / "dataset_info.json").exists():
        if ARRAY_RECORD in prepared.info.available_file_formats():
            return path
        raise UserError(
            f"tfds:{dataset} is prepared in {path}, but not as ArrayRecord; run"
            f" `{PROGRAM} convert {path}`."
        )
    builder = tfds_builder(dataset, data_dir, file_format="array_record")
    # The default of ten retries takes minutes without a network.
    downloader.MAX_RETRIES = 3
    options = tfds.download.DownloadConfig(
        manual_dir=manual_dir or None, try_download_gcs=False
    )
    try:
        builder.download_and_prepare(download_config=options)
    except Exception as error:
        raise UserError(
            f"tfds:{dataset} is not prepared. {advice_on(error)}"
        ) from error
    return path


def advice_on(error: Exception) -> str:
    """Returns a sentence that says what to do about an error of a tfds builder."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    text = " ".join(str(chain[-1]).split())
    if any("No module named 'tensorflow'" in str(link) for link in chain):
        return (
            "Its builder needs TensorFlow: pip install tensorflow, and"
            " run this command again."
        )
    names = {type(link).__name__ for link in chain}
    if names & {"ConnectionError", "gaierror", "NewConnectionError", "DownloadError"}:
        url = getattr(getattr(error, "request", None), "url", None)
        files = url or "the files that its page on tensorflow.org/datasets names"
        return (
            f"The network cannot be reached: fetch {files}, put it into a directory,"
            " and run this command again with --manual_dir=DIRECTORY."
        )
    if wrong := re.search("Artifact (.*), downloaded to (.*), has wrong check", text):
        url, path = wrong.groups()
        return (
            f"{path} is not the file that tfds knows (its checksum differs): delete it,"
            f" fetch {url} again, and run this command again."
        )
    if isinstance(chain[-1], AssertionError | FileNotFoundError):
        return f"{text} (--manual_dir=DIRECTORY names the directory of the files.)"
    return f"{type(chain[-1]).__name__}: {text[:300]}"


@dataclasses.dataclass(frozen=True)
class Options:
    """The data set to prepare, and the options of its preparation.

    Attributes:
      source: `imagenet2012`, `tfds:NAME[/CONFIG]`, `folder:PATH` or `convert`.
      directory: The directory that `convert` reads.
      data_dir: The directory in which tfds keeps its data sets; empty for its default.
      manual_dir: The directory of archives that are not downloaded.
      out: The directory that is made; empty for a name next to the source's.
      reencode: The re-encoding of the images; None to keep the files as they are.
      num_workers: The number of processes.
      imagenet_tars: The archive of each split of ImageNet.
      shard_bytes: The approximate size of a shard of images from archives or folders.
    """

    source: str
    directory: str
    data_dir: str
    manual_dir: str
    out: str
    reencode: Reencode | None
    num_workers: int
    imagenet_tars: Mapping[str, originals.Tar] = dataclasses.field(
        default_factory=originals.IMAGENET.copy
    )
    shard_bytes: int = pack.SHARD_BYTES

    @property
    def command(self) -> str:
        """The shell command that does the same, up to the output directory."""
        if self.in_place:
            return f"{PROGRAM} convert "
        words = [self.source]
        if self.source.startswith("folder:"):
            words = [f"folder:{_absolute(self.source.removeprefix('folder:'))}"]
        if self.directory:
            words.append(str(_absolute(self.directory)))
        for key in ("data_dir", "manual_dir"):
            if value := getattr(self, key):
                words.append(f"--{key}={_absolute(value)}")
        if self.reencode:
            words += [
                f"--max_side={self.reencode.max_side}",
                f"--quality={self.reencode.quality}",
            ]
            if self.reencode.max_pixels != MAX_PIXELS:
                words.append(f"--max_pixels={self.reencode.max_pixels}")
        return f"{PROGRAM} {shlex.join(words)} --out="

    @property
    def in_place(self) -> bool:
        """Tells whether ArrayRecord files are added to a directory of TFRecords."""
        return self.source == "convert" and not (self.out or self.reencode)

    @property
    def suffix(self) -> str:
        """The end of the name of a re-encoded data set; empty without re-encoding."""
        return self.reencode.suffix if self.reencode else ""

    @property
    def root(self) -> pathlib.Path:
        """The directory in which tfds keeps its data sets."""
        return _absolute(self.data_dir or tfds.core.constants.DATA_DIR)

    def out_or(self, default: pathlib.Path) -> pathlib.Path:
        """Returns the directory to write: `out`, or the default if that is empty."""
        return _absolute(self.out) if self.out else default


def _local(path: str) -> pathlib.Path:
    return storage.local_path_of(path, "The data that prepare reads and writes")


def _absolute(path: str) -> pathlib.Path:
    return _local(path).expanduser().absolute()


def _pack(data: DataSet, out: pathlib.Path, options: Options) -> pathlib.Path:
    pack.pack(
        data,
        out,
        command=options.command,
        reencode=options.reencode,
        workers=options.num_workers,
    )
    return out


def _prepare_imagenet(options: Options) -> pathlib.Path:
    builder = tfds.builder("imagenet2012", data_dir=str(options.root))
    name = f"imagenet2012{options.suffix}"
    out = options.out_or(options.root / name / str(builder.version))
    manual_dir = _absolute(options.manual_dir or f"{options.root}/downloads/manual")
    scratch = pack.work_dir(out) / pack.SCRATCH
    data = originals.imagenet(
        builder.info,
        manual_dir,
        scratch,
        tars=options.imagenet_tars,
        shard_bytes=options.shard_bytes,
    )
    return _pack(data, out, options)


def _prepare_tfds(options: Options) -> pathlib.Path:
    if options.out and not options.reencode:
        raise UserError(
            "A builder of tfds writes into --data_dir=DIRECTORY; --out is for the"
            " smaller images of --max_side or --quality."
        )
    dataset = options.source.removeprefix("tfds:")
    path = build(dataset, str(options.root), options.manual_dir)
    return _reencode(path, options) if options.reencode else path


def _prepare_folder(options: Options) -> pathlib.Path:
    path = options.source.removeprefix("folder:")
    root = _absolute(path)
    beside = root.with_name(f"{root.name}{options.suffix or '_arrayrecord'}")
    data = originals.folder(path, options.shard_bytes)
    return _pack(data, options.out_or(beside), options)


def _convert(options: Options) -> pathlib.Path:
    directory = _absolute(options.directory)
    if not options.in_place:
        return _reencode(directory, options)
    builder = builder_of(directory)
    if builder.info.file_format == ARRAY_RECORD:
        raise UserError(f"{directory} is ArrayRecord already; there is nothing to do.")
    data = originals.prepared(builder)
    workers = options.num_workers
    pack.convert(data, directory, command=options.command, workers=workers)
    return directory


def _reencode(directory: pathlib.Path, options: Options) -> pathlib.Path:
    data = originals.prepared(builder_of(directory))
    default = options.root / f"{data.name}{options.suffix}" / data.version
    return _pack(data, options.out_or(default), options)


def prepare(options: Options) -> pathlib.Path:
    """Prepares a data set, or resumes its preparation, and returns its directory.

    Raises:
      UserError: The source is unknown or incomplete, or a package is missing.
    """
    kind, _, rest = options.source.partition(":")
    if options.source == "convert":
        return _convert(options)
    if options.source in ("imagenet2012", "tfds:imagenet2012"):
        return _prepare_imagenet(options)
    if kind == "tfds" and rest:
        return _prepare_tfds(options)
    if kind == "folder" and rest:
        return _prepare_folder(options)
    raise UserError(
        f"There is no source {options.source!r}. Write imagenet2012, tfds:NAME,"
        " folder:PATH, convert DIRECTORY or verify DIRECTORY."
    )


def split_sizes(path: pathlib.Path) -> dict[str, int]:
    """Returns the number of images of each split of a prepared data set."""
    splits = builder_of(path).info.splits
    return {split.name: split.num_examples for split in splits.values()}


def check(
    source: str, data_dir: str, num_workers: int, max_pixels: int
) -> tuple[int, str, Iterator[str]]:
    """Reads and decodes all images of a data set.

    Args:
      source: `folder:PATH`, `csv:FILE`, `tfds:NAME` or the directory of a prepared data
        set.
      data_dir: The directory in which tfds keeps its data sets; empty for its default.
      num_workers: The number of processes.
      max_pixels: The number of pixels beyond which an image cannot be decoded.

    Returns:
      The number of images, a clause on the files that are not taken for images (see
      `image_files.describe`), and a sentence for each problem.

    Raises:
      UserError: The data set is not prepared.
    """
    kind, _, rest = source.partition(":")
    checks: list[FilesCheck] | list[ShardCheck]
    left_out: Counter[str] = Counter()
    if kind == "folder":
        sources = [FolderSource(rest, split) for split in folder_splits(rest)]
        checks = [
            check for part in sources for check in checks_of_files(part, max_pixels)
        ]
        for part in sources:
            left_out += part.left_out
    elif kind == "csv":
        tables = [CsvSource(rest, split) for split in csv_splits(rest)]
        checks = [
            check for part in tables for check in checks_of_files(part, max_pixels)
        ]
    else:
        dataset = rest if kind == "tfds" else str(_absolute(source))
        builder = tfds_builder(dataset, data_dir)
        if not (builder.data_path / "dataset_info.json").exists():
            raise UserError(f"tfds:{dataset} is not prepared in {builder.data_path}.")
        checks = checks_of_builder(builder, max_pixels)
    total = sum(map(len, checks))
    return total, describe(left_out), verify(checks, num_workers)
