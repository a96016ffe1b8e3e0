"""Reads the originals of data sets that `pack.py` writes as ArrayRecord.

They are ImageNet's tar files, image folders, and data sets that tfds has prepared.
"""

import dataclasses
import json
import os
import pathlib
import re
import tarfile
from collections.abc import Iterator, Mapping

import tensorflow_datasets as tfds

from resnet_jax.console import output
from resnet_jax.data.derived_sources import check_same_classes
from resnet_jax.data.folder_source import FolderSource, folder_splits
from resnet_jax.data.image_files import describe
from resnet_jax.data.prepare import pack
from resnet_jax.data.prepare.pack import DataSet, ImageFile, PreparedFile
from resnet_jax.data.shards import is_utf8
from resnet_jax.data.splits import ALL
from resnet_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tar:
    """The name and content of an archive of ImageNet.

    Attributes:
      name: The name of the file.
      size: The size of the file in bytes.
      images: The number of images in it.
    """

    name: str
    size: int
    images: int


IMAGENET = {
    "train": Tar("ILSVRC2012_img_train.tar", 147_897_477_120, 1_281_167),
    "validation": Tar("ILSVRC2012_img_val.tar", 6_744_924_160, 50_000),
}


def imagenet(
    info: tfds.core.DatasetInfo,
    manual_dir: pathlib.Path,
    scratch: pathlib.Path,
    *,
    tars: Mapping[str, Tar] = IMAGENET,
    shard_bytes: int = pack.SHARD_BYTES,
) -> DataSet:
    """Returns ImageNet (ILSVRC 2012) from its tar files, as the builder of tfds has it.

    Args:
      info: The metadata of that builder.
      manual_dir: The directory of the tar files.
      scratch: The directory that keeps the lists of their content, once made.
      tars: The tar file of each split.
      shard_bytes: The approximate size of a shard.

    Raises:
      UserError: A tar file is missing or is not the original.
    """
    from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder

    paths = {split: manual_dir / tar.name for split, tar in tars.items()}
    for split, path in paths.items():
        _check_tar(path, tars[split])
    labels = {name: label for label, name in enumerate(info.features["label"].names)}
    truth = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    validation = {
        f"ILSVRC2012_val_{number:08d}.JPEG": labels[synset]
        for number, synset in enumerate(truth.read_text().split(), 1)
    }
    odd = (
        *imagenet2012_dataset_builder.CMYK_IMAGES,
        *imagenet2012_dataset_builder.PNG_IMAGES,
    )
    splits = {}
    for split, path in paths.items():
        files = []
        for start, size, name in _members(path, scratch):
            if split == "train":
                label = labels.get(name.split("_")[0])
            else:
                label = validation.get(name)
            if label is None:
                raise UserError(
                    f"{path} holds {name!r}, which is not an image of ImageNet: it is"
                    " not the original; fetch it again."
                )
            files.append(ImageFile(str(path), start, size, label, name))
        expected = tars[split].images
        if len(files) != expected:
            raise UserError(
                f"{path} holds {len(files):,} images, not {expected:,}: it is not the"
                " original; fetch it again."
            )
        splits[split] = pack.deal(files, odd, shard_bytes)
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
    """Returns the start, size and name of each image in a tar file.

    The list includes the images of tar files inside of it. Reading the headers of a
    large archive takes minutes, so the list is kept in `scratch`.
    """
    list_path = scratch / f"{path.name}.{path.stat().st_mtime_ns}.json"
    if not list_path.exists():
        output.say(f"Looking for images in {path} ...")
        try:
            members = list(_walk(path, 0))
        except tarfile.TarError as error:
            raise UserError(f"{path} is damaged: {error}; fetch it again.") from None
        scratch.mkdir(parents=True, exist_ok=True)
        pack.write_json(list_path, members)
    return json.loads(list_path.read_text())


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
    """Returns the part of a data set's metadata that its packed copy keeps."""
    return {
        "description": info.description,
        "homepage": info.homepage,
        "citation": info.citation,
        "license": info.redistribution_info.license,
        "supervised_keys": info.supervised_keys,
    }


def folder(path: str, shard_bytes: int = pack.SHARD_BYTES) -> DataSet:
    """Returns an image folder as a data set that keeps the files as they are.

    Args:
      path: The folder, which holds SPLIT/CLASS/IMAGE.jpg or CLASS/IMAGE.jpg.
      shard_bytes: The approximate size of a shard.

    Raises:
      UserError: There are no images, splits differ in their classes, or tfds cannot
        keep the name of a split, a class or a file.
    """
    names = folder_splits(path)
    for name in names:
        _check_split_name(name, path)
    sources = {split: FolderSource(path, split) for split in names}
    first, *other_sources = sources.values()
    for name in first.classes:
        _check_class_name(name, path)
    for source in other_sources:
        check_same_classes(first, source)
    splits = {}
    for split, source in sources.items():
        if source.left_out:
            output.say(f"{source.title}: {describe(source.left_out)}.")
        files = []
        for index, (name, label) in enumerate(
            zip(source.paths, source.labels, strict=True)
        ):
            file = source.name(index)
            if not is_utf8(name):
                raise UserError(f"The name of {file!r} is not UTF-8; rename it.")
            files.append(ImageFile(file, 0, os.path.getsize(file), label, name))
        splits[split] = pack.deal(files, shard_bytes=shard_bytes)
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=first.classes),
            "file_name": tfds.features.Text(),
        }
    )
    root = pathlib.Path(path).expanduser().resolve()
    about = {
        # The metadata are UTF-8, which the path need not be.
        "description": f"The images of {root}.".encode(errors="replace").decode(),
        "supervised_keys": ("image", "label"),
    }
    return DataSet(_as_name(root.name), "1.0.0", features, splits, about)


def _check_split_name(name: str, path: str) -> None:
    # The first is tfds's own rule for `split=`, in which it reserves `all`.
    fits = re.fullmatch(r"[\w-]+", name) and re.search(r"[^\W_]", name)
    if not fits or name == ALL or not is_utf8(name):
        raise UserError(
            f"{path} has a split {name!r}, which tfds cannot open, as it takes names of"
            f" letters, digits, - and _ that are not {ALL!r}; rename the folder."
        )


def _check_class_name(name: str, path: str) -> None:
    # tfds keeps the names of classes as lines of a text file.
    if not is_utf8(name) or name != name.strip() or re.search(r"[\r\n]", name):
        raise UserError(
            f"{path} has a class {name!r}, whose name tfds would change, as it keeps"
            " one name a line, in UTF-8 and without spaces at its ends; rename the"
            f" folder in all splits, or train on folder:{path} itself."
        )


def _as_name(text: str) -> str:
    """Returns the nearest name that tfds accepts for a data set."""
    name = re.sub("[^a-z0-9_]+", "_", text.lower())
    return name if name[:1].isalpha() else f"images_{name}"


def prepared(builder: tfds.core.DatasetBuilder) -> DataSet:
    """Returns a data set that tfds has prepared, shard by shard."""
    info = builder.info
    splits = {
        split.name: [
            PreparedFile(str(path), length)
            for path, length in zip(split.filepaths, split.shard_lengths, strict=True)
        ]
        for split in info.splits.values()
    }
    return DataSet(info.name, str(info.version), info.features, splits, _about(info))
