"""Prepares data sets as ArrayRecord, and verifies them.

python -m resnet_jax.prepare imagenet2012 --manual_dir=DIR   from its two tar files
python -m resnet_jax.prepare tfds:NAME[/CONFIG]              with the builder of tfds
python -m resnet_jax.prepare folder:PATH                     PATH/SPLIT/CLASS/IMAGE.jpg
python -m resnet_jax.prepare convert DIR                     TFRecords of tfds
python -m resnet_jax.prepare verify SOURCE_OR_DIR            lists what is wrong

--max_side=N and --quality=Q make the images smaller, once: the longer side becomes at
most N pixels, and the image a JPEG of quality Q (90 if only N is given), 4:2:0.

Everything but tfds:NAME can be interrupted: the same command goes on. tfds:NAME is also
the one that may need TensorFlow (`requirements-prepare.txt`), with which many builders
extract their archives. Training reads the results without it.
"""

import argparse
import dataclasses
import json
import logging
import os
import pathlib
import re
import shlex
import sys
import tarfile
from collections.abc import Iterator, Sequence

import tensorflow_datasets as tfds
import tqdm
from tensorflow_datasets.core.download import downloader

from resnet_jax import storage
from resnet_jax.data import pack
from resnet_jax.data.pack import DataSet, ImageFile, PreparedFile, Reencode
from resnet_jax.data.sources import FolderSource, check_same_classes, folder_splits
from resnet_jax.data.tfds_source import tfds_builder
from resnet_jax.data.verify import checks_of_builder, checks_of_folder, verify
from resnet_jax.errors import UserError

PROGRAM = "python -m resnet_jax.prepare"
ARRAY_RECORD = tfds.core.FileFormat.ARRAY_RECORD


@dataclasses.dataclass(frozen=True)
class Tar:
    """What is known of an archive of ImageNet.

    Attributes:
      name: of the file.
      size: in bytes.
      images: how many are in it.
    """

    name: str
    size: int
    images: int


IMAGENET = {
    "train": Tar("ILSVRC2012_img_train.tar", 147_897_477_120, 1_281_167),
    "validation": Tar("ILSVRC2012_img_val.tar", 6_744_924_160, 50_000),
}


def prepare(dataset: str, data_dir: str = "", manual_dir: str = "") -> pathlib.Path:
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
    """What to do about an error of a tfds builder, from what caused it."""
    chain = [error]
    while (after := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(after)
    text = " ".join(str(chain[-1]).split())
    if any("No module named 'tensorflow'" in str(link) for link in chain):
        return (
            "Its builder needs TensorFlow: pip install -r requirements-prepare.txt, and"
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


def imagenet(
    info: tfds.core.DatasetInfo, manual_dir: pathlib.Path, scratch: pathlib.Path
) -> DataSet:
    """ImageNet (ILSVRC 2012) from its tar files, as the builder of tfds has it.

    Args:
      info: of that builder.
      manual_dir: where the tar files lie.
      scratch: where the lists of what is in them are kept, once made.

    Raises:
      UserError: a tar file is missing, or is not the original.
    """
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

    paths = {split: manual_dir / tar.name for split, tar in IMAGENET.items()}
    for split, path in paths.items():
        _check_tar(path, IMAGENET[split])
    synset_to_label = info.features["label"].str2int
    truth = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    validation = [synset_to_label(synset) for synset in truth.read_text().split()]
    odd = (
        *imagenet2012_dataset_builder.CMYK_IMAGES,
        *imagenet2012_dataset_builder.PNG_IMAGES,
    )
    splits = {}
    for split, path in paths.items():
        files = []
        for start, size, name in _members(path, scratch):
            if split == "train":
                label = synset_to_label(name.split("_")[0])
            else:
                # ILSVRC2012_val_00000001.JPEG has the first label.
                label = validation[int(re.findall(r"\d+", name)[-1]) - 1]
            files.append(ImageFile(str(path), start, size, label, name))
        expected = IMAGENET[split].images
        if len(files) != expected:
            raise UserError(
                f"{path} holds {len(files):,} images, not {expected:,}: it is not the"
                " original; fetch it again."
            )
        splits[split] = pack.deal(files, odd)
    return DataSet(
        "imagenet2012", str(info.version), info.features, splits, _about(info)
    )


def _check_tar(path: pathlib.Path, tar: Tar) -> None:
    if not path.exists():
        raise UserError(
            f"{tar.name} ({tar.size:,} bytes) is not in {path.parent}: register at"
            " https://image-net.org/download-images, fetch it, put it into a directory,"
            " and run this command again with --manual_dir=DIRECTORY."
        )
    size = path.stat().st_size
    if size != tar.size:
        raise UserError(
            f"{path} has {size:,} bytes, not {tar.size:,}: its download is"
            f" {'not finished' if size < tar.size else 'not the original'}; fetch it"
            " again."
        )


def _members(path: pathlib.Path, scratch: pathlib.Path) -> list[list]:
    """Start, size and name of each image in a tar file, or in the tar files in it.

    Looking through a large archive takes minutes, so the list is kept in `scratch`.
    """
    kept = scratch / f"{path.name}.{path.stat().st_mtime_ns}.json"
    if not kept.exists():
        print(f"Looking for images in {path} ...", flush=True)
        try:
            members = list(_walk(path, 0))
        except tarfile.TarError as error:
            raise UserError(f"{path} is damaged: {error}; fetch it again.") from None
        scratch.mkdir(parents=True, exist_ok=True)
        pack.write_json(kept, members)
    return json.loads(kept.read_text())


def _walk(path: pathlib.Path, start: int) -> Iterator[tuple[int, int, str]]:
    with path.open("rb") as file:
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if member.name.endswith(".tar"):
                    yield from _walk(path, member.offset_data)
                elif member.isfile():
                    name = member.name.rpartition("/")[2]
                    yield member.offset_data, member.size, name


def _about(info: tfds.core.DatasetInfo) -> dict:
    """What the metadata of a data set say of it."""
    return {
        "description": info.description,
        "homepage": info.homepage,
        "citation": info.citation,
        "license": info.redistribution_info.license,
        "supervised_keys": info.supervised_keys,
    }


def folder(path: str) -> DataSet:
    """An image folder, PATH/SPLIT/CLASS/IMAGE.jpg; the files go in as they are.

    Raises:
      UserError: there are no images, or splits differ in their classes.
    """
    sources = {split: FolderSource(path, split) for split in folder_splits(path)}
    first, *others = sources.values()
    for other in others:
        check_same_classes(first, other)
    splits = {}
    for split, source in sources.items():
        splits[split] = pack.deal(
            [
                ImageFile(
                    source.name(index),
                    0,
                    os.path.getsize(source.name(index)),
                    source.labels[index],
                    source.paths[index],
                )
                for index in range(len(source))
            ]
        )
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=first.classes),
            "file_name": tfds.features.Text(),
        }
    )
    root = pathlib.Path(path).expanduser().resolve()
    about = {
        "description": f"The images of {root}.",
        "supervised_keys": ("image", "label"),
    }
    return DataSet(_as_name(root.name), "1.0.0", features, splits, about)


def _as_name(text: str) -> str:
    """The nearest name that tfds takes for a data set."""
    name = re.sub("[^a-z0-9_]+", "_", text.lower())
    return name if name[:1].isalpha() else f"images_{name}"


def prepared(builder: tfds.core.DatasetBuilder) -> DataSet:
    """A data set that tfds has prepared, shard by shard."""
    info = builder.info
    splits = {
        split.name: [
            PreparedFile(str(path), length)
            for path, length in zip(split.filepaths, split.shard_lengths, strict=True)
        ]
        for split in info.splits.values()
    }
    return DataSet(info.name, str(info.version), info.features, splits, _about(info))


def _builder_of(directory: pathlib.Path) -> tfds.core.DatasetBuilder:
    """The builder of a prepared directory."""
    try:
        return tfds.builder_from_directory(directory)
    except (tfds.core.dataset_info.DatasetInfoFileError, ValueError) as error:
        raise UserError(
            f"{directory} is no data set that tfds has prepared:"
            f" {' '.join(str(error).split())[:200]}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line; see the module's docstring."""

    source: str
    directory: str
    data_dir: str
    manual_dir: str
    out: str
    reencode: Reencode | None
    num_workers: int

    @property
    def command(self) -> str:
        """What to type to do the same, but for the directory to be made, its end."""
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
        """Whether ArrayRecord files are added to a directory of TFRecords."""
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
        say=tqdm.tqdm.write,
    )
    return out


def _prepare_imagenet(options: Options) -> pathlib.Path:
    builder = tfds.builder("imagenet2012", data_dir=str(options.root))
    name = f"imagenet2012{options.suffix}"
    out = options.out_or(options.root / name / str(builder.version))
    manual_dir = _absolute(options.manual_dir or f"{options.root}/downloads/manual")
    scratch = pack.work_dir(out) / pack.SCRATCH
    return _pack(imagenet(builder.info, manual_dir, scratch), out, options)


def _prepare_tfds(options: Options) -> pathlib.Path:
    if options.out and not options.reencode:
        raise UserError(
            "A builder of tfds writes into --data_dir=DIRECTORY; --out is for the"
            " smaller images of --max_side or --quality."
        )
    dataset = options.source.removeprefix("tfds:")
    _local(options.data_dir)
    path = prepare(dataset, options.data_dir, options.manual_dir)
    return _reencode(path, options) if options.reencode else path


def _prepare_folder(options: Options) -> pathlib.Path:
    path = options.source.removeprefix("folder:")
    root = _absolute(path)
    beside = root.with_name(f"{root.name}{options.suffix or '_arrayrecord'}")
    return _pack(folder(path), options.out_or(beside), options)


def _convert(options: Options) -> pathlib.Path:
    directory = _absolute(options.directory)
    if not options.in_place:
        return _reencode(directory, options)
    builder = _builder_of(directory)
    if builder.info.file_format == ARRAY_RECORD:
        raise UserError(f"{directory} is ArrayRecord already; nothing is to be done.")
    data = prepared(builder)
    workers = options.num_workers
    pack.convert(data, directory, command=options.command, workers=workers)
    return directory


def _reencode(directory: pathlib.Path, options: Options) -> pathlib.Path:
    data = prepared(_builder_of(directory))
    default = options.root / f"{data.name}{options.suffix}" / data.version
    return _pack(data, options.out_or(default), options)


def _verify(options: Options) -> None:
    """Prints what is wrong with a data set; exits with 1 if anything is."""
    source = options.directory
    kind, _, rest = source.partition(":")
    if kind == "folder":
        sources = [FolderSource(rest, split) for split in folder_splits(rest)]
        checks = [check for part in sources for check in checks_of_folder(part)]
    else:
        dataset = rest if kind == "tfds" else str(_absolute(source))
        builder = tfds_builder(dataset, options.data_dir)
        if not (builder.data_path / "dataset_info.json").exists():
            raise UserError(f"tfds:{dataset} is not prepared in {builder.data_path}.")
        checks = checks_of_builder(builder)
    wrong = 0
    for problem in verify(checks, options.num_workers):
        wrong += 1
        tqdm.tqdm.write(problem, file=sys.stdout)
    total = sum(map(len, checks))
    if wrong:
        raise SystemExit(f"error: {wrong:,} things are wrong in {source}.")
    print(f"All {total:,} images of {source} are readable.")


def _options(argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="imagenet2012, tfds:NAME, folder:PATH, ...")
    parser.add_argument("directory", nargs="?", default="", help="of convert, verify")
    parser.add_argument("--data_dir", default="", help="where tfds keeps its data sets")
    parser.add_argument("--manual_dir", default="", help="where files lie already")
    parser.add_argument("--out", default="", help="the directory to be made")
    parser.add_argument("--max_side", type=int, default=0, help="pixels, at most")
    parser.add_argument("--quality", type=int, default=0, help="of JPEG, 1 to 100")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    parser.add_argument(
        "--num_workers",
        type=int,
        default=cores or os.cpu_count() or 1,
        help="processes; one a core unless told",
    )
    args = vars(parser.parse_args(argv))
    max_side, quality = args.pop("max_side"), args.pop("quality")
    reencode = Reencode(max_side, quality or 90) if max_side or quality else None
    return Options(reencode=reencode, **args)


def main(argv: Sequence[str]) -> None:
    """Command line: see the module's docstring."""
    options = _options(argv[1:])
    # It warns of each of many retries where there is no network.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    kind, _, rest = options.source.partition(":")
    if options.source in ("convert", "verify") and not options.directory:
        raise UserError(f"Write {options.source} DIRECTORY.")
    if options.source == "verify":
        return _verify(options)
    if options.source == "convert":
        path = _convert(options)
    elif options.source in ("imagenet2012", "tfds:imagenet2012"):
        path = _prepare_imagenet(options)
    elif kind == "tfds" and rest:
        path = _prepare_tfds(options)
    elif kind == "folder" and rest:
        path = _prepare_folder(options)
    else:
        raise UserError(
            f"What is {options.source!r}? Write imagenet2012, tfds:NAME, folder:PATH,"
            " convert DIRECTORY or verify DIRECTORY."
        )
    counts = ", ".join(
        f"{split.name} {split.num_examples:,}"
        for split in _builder_of(path).info.splits.values()
    )
    print(f"{path} is prepared ({counts} images).")
    print(f"Train on it with --config.data.source=tfds:{path}")


def run(argv: Sequence[str]) -> None:
    """The command; what goes wrong becomes a sentence and an exit code."""
    try:
        main(argv)
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(
            f"error: {error.filename or 'A file'}: {error.strerror}; the same command"
            " goes on when that is mended."
        )
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run(sys.argv)
