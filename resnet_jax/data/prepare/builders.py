"""Preparing data sets as ArrayRecord: from archives, folders, TFRecords or by tfds."""

import dataclasses
import pathlib
import re
import shlex
from collections.abc import Iterator

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import downloader

from resnet_jax.data.prepare import originals, pack
from resnet_jax.data.prepare.pack import DataSet, Reencode
from resnet_jax.data.prepare.verify import checks_of_builder, checks_of_folder, verify
from resnet_jax.data.sources import FolderSource, folder_splits
from resnet_jax.data.tfds_source import tfds_builder
from resnet_jax.errors import UserError
from resnet_jax.persistence import storage

PROGRAM = "python -m resnet_jax.prepare"
ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD


def build(dataset: str, data_dir: str = "", manual_dir: str = "") -> pathlib.Path:
    """Prepares a data set of tfds with the builder of tfds; returns where it is.

    Args:
      dataset: NAME[/CONFIG].
      data_dir: where tfds keeps its data sets; empty: tfds's default.
      manual_dir: where files lie that are not to be downloaded.

    Raises:
      UserError: an unknown data set, a missing package, or no way to get the files.
    """
    there = tfds_builder(dataset, data_dir)
    path = pathlib.Path(there.data_path)
    if (path / "dataset_info.json").exists():
        if ARRAY_RECORD in there.info.available_file_formats():
            return path
        raise UserError(
            f"tfds:{dataset} is prepared in {path}, but not as ArrayRecord; run"
            f" `{PROGRAM} convert {path}`."
        )
    builder = tfds_builder(dataset, data_dir, file_format="array_record")
    # Its ten retries take minutes where there is no network.
    downloader.MAX_RETRIES = 3
    options = tfds.download.DownloadConfig(
        manual_dir=manual_dir or None, try_download_gcs=False
    )
    try:
        builder.download_and_prepare(download_config=options)
    except Exception as error:
        raise UserError(f"tfds:{dataset} is not prepared. {way_out(error)}") from error
    return path


def way_out(error: Exception) -> str:
    """Returns what to do about an error of a tfds builder, from its cause."""
    chain = [error]
    while (after := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(after)
    text = " ".join(str(chain[-1]).split())
    if any("No module named 'tensorflow'" in str(link) for link in chain):
        return (
            "Its builder needs TensorFlow: pip install tensorflow, and"
            " run this command again."
        )
    names = {type(link).__name__ for link in chain}
    if names & {"ConnectionError", "gaierror", "NewConnectionError", "DownloadError"}:
        url = getattr(getattr(error, "request", None), "url", None)
        what = url or "what its page on tensorflow.org/datasets names"
        return (
            f"There is no way to the network: fetch {what}, put it into a directory,"
            " and run this command again with --manual_dir=DIRECTORY."
        )
    if wrong := re.search("Artifact (.*), downloaded to (.*), has wrong check", text):
        url, path = wrong.groups()
        return (
            f"{path} is not the file that tfds knows (its checksum is another one):"
            f" delete it, fetch {url} again, and run this command again."
        )
    if isinstance(chain[-1], AssertionError | FileNotFoundError):
        return f"{text} (--manual_dir=DIRECTORY says where files lie.)"
    return f"{type(chain[-1]).__name__}: {text[:300]}"


@dataclasses.dataclass(frozen=True)
class Options:
    """The data set to prepare, and its place.

    Attributes:
      source: `imagenet2012`, `tfds:NAME[/CONFIG]`, `folder:PATH` or `convert`.
      directory: The directory that `convert` reads.
      data_dir: The directory in which tfds keeps its data sets; empty for its default.
      manual_dir: The directory of archives that are not downloaded.
      out: The directory that is made; empty for a name next to the source's.
      reencode: How images are made smaller; None to leave them as they are.
      num_workers: The number of processes.
    """

    source: str
    directory: str
    data_dir: str
    manual_dir: str
    out: str
    reencode: Reencode | None
    num_workers: int

    @property
    def command(self) -> str:
        """Returns the command that does the same, up to the output directory."""
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
        return f"{PROGRAM} {shlex.join(words)} --out="

    @property
    def in_place(self) -> bool:
        """Tells whether ArrayRecord files are added to a directory of TFRecords."""
        return self.source == "convert" and not (self.out or self.reencode)

    @property
    def suffix(self) -> str:
        """What the name of a re-encoded data set ends in."""
        return self.reencode.suffix if self.reencode else ""

    @property
    def root(self) -> pathlib.Path:
        """Where tfds keeps its data sets."""
        return _absolute(self.data_dir or tfds.core.constants.DATA_DIR)

    def out_or(self, default: pathlib.Path) -> pathlib.Path:
        """The directory to be made."""
        return _absolute(self.out) if self.out else default


def _local(path: str) -> pathlib.Path:
    return storage.local_path_of(path, "What prepare reads and writes")


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
    return _pack(originals.imagenet(builder.info, manual_dir, scratch), out, options)


def _prepare_tfds(options: Options) -> pathlib.Path:
    if options.out and not options.reencode:
        raise UserError(
            "A builder of tfds writes into --data_dir=DIRECTORY; --out is for the"
            " smaller images of --max_side or --quality."
        )
    dataset = options.source.removeprefix("tfds:")
    _local(options.data_dir)
    path = build(dataset, options.data_dir, options.manual_dir)
    return _reencode(path, options) if options.reencode else path


def _prepare_folder(options: Options) -> pathlib.Path:
    path = options.source.removeprefix("folder:")
    root = _absolute(path)
    beside = root.with_name(f"{root.name}{options.suffix or '_arrayrecord'}")
    return _pack(originals.folder(path), options.out_or(beside), options)


def _convert(options: Options) -> pathlib.Path:
    directory = _absolute(options.directory)
    if not options.in_place:
        return _reencode(directory, options)
    builder = originals.builder_of(directory)
    if builder.info.file_format == ARRAY_RECORD:
        raise UserError(f"{directory} is ArrayRecord already; nothing is to be done.")
    data = originals.prepared(builder)
    workers = options.num_workers
    pack.convert(data, directory, command=options.command, workers=workers)
    return directory


def _reencode(directory: pathlib.Path, options: Options) -> pathlib.Path:
    data = originals.prepared(originals.builder_of(directory))
    default = options.root / f"{data.name}{options.suffix}" / data.version
    return _pack(data, options.out_or(default), options)


def prepare(options: Options) -> pathlib.Path:
    """Prepares a data set, or resumes that; returns its directory.

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
    splits = originals.builder_of(path).info.splits
    return {split.name: split.num_examples for split in splits.values()}


def check(source: str, data_dir: str, num_workers: int) -> tuple[int, Iterator[str]]:
    """Reads all images of a data set.

    Args:
      source: `folder:PATH`, `tfds:NAME` or the directory of a prepared data set.
      data_dir: The directory in which tfds keeps its data sets; empty for its default.
      num_workers: The number of processes.

    Returns:
      The number of images, and a sentence for each thing that is wrong.

    Raises:
      UserError: The data set is not there.
    """
    kind, _, rest = source.partition(":")
    if kind == "folder":
        sources = [FolderSource(rest, split) for split in folder_splits(rest)]
        checks = [check for part in sources for check in checks_of_folder(part)]
    else:
        dataset = rest if kind == "tfds" else str(_absolute(source))
        builder = tfds_builder(dataset, data_dir)
        if not (builder.data_path / "dataset_info.json").exists():
            raise UserError(f"tfds:{dataset} is not prepared in {builder.data_path}.")
        checks = checks_of_builder(builder)
    return sum(map(len, checks)), verify(checks, num_workers)
