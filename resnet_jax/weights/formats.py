"""Tells the format of a file of weights by its content.

A name is only a hint: files are renamed, and in place of weights there may be what a
failed download left. All of this is told from the first bytes, at one place.
"""

import os
import pathlib
import zipfile

import h5py

from resnet_jax.errors import UserError
from resnet_jax.persistence.storage import Path
from resnet_jax.weights.stored import MAX_HEADER, UnreadableError, explaining_damage

SAFETENSORS, NPZ, H5, KERAS, TORCH = ".safetensors", ".npz", ".h5", ".keras", ".pth"
# A list of the files over which tensors are distributed.
INDEX = ".index.json"

# The file of weights in a `.keras`.
KERAS_WEIGHTS = "model.weights.h5"
# The first pickle of each file of torch.save before version 1.6.
_TORCH_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")

_FETCH_AGAIN = "Fetch the file again"
# The first bytes of files that are not weights, what they are, and what to do.
_OTHERS = (
    (
        (b"version https://git-lfs", b"version https://hawser"),
        "is a pointer of Git LFS and not the file that it stands for",
        "Run git lfs pull in its repository",
    ),
    (
        (b"/annex/objects/",),
        "is a pointer of git-annex and not the file that it stands for",
        "Run git annex get in its repository",
    ),
    (
        (b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--"),
        "is a web page, which a download got instead of the file",
        "Fetch it from the address of the file itself, and log in if the site asks",
    ),
    (
        (b"{", b"["),
        "is text in JSON and not a file of weights",
        _FETCH_AGAIN,
    ),
    (
        (b"\x93numpy",),
        "is a single array of numpy.save, without a name",
        "Save all arrays by their names with numpy.savez",
    ),
    (
        (b"gguf",),
        "is a language model in GGUF",
        "Give a file of weights of a residual network",
    ),
    (
        (b"\x00" * 16,),
        "begins with zeros, so it was not written completely",
        _FETCH_AGAIN,
    ),
)
# The first bytes of compressed files, and the programs that unpack them.
_COMPRESSED = (
    (b"\x1f\x8b", "gunzip"),
    (b"BZh", "bunzip2"),
    (b"\xfd7zXZ", "unxz"),
    (b"\x28\xb5\x2f\xfd", "unzstd"),
    (b"7z\xbc\xaf\x27\x1c", "7z x"),
    (b"Rar!", "unrar x"),
)


def format_of(path: pathlib.Path) -> str | None:
    """Returns the suffix of a file's format, or None if its content is not known.

    Args:
      path: The file, whose own suffix does not count.

    Returns:
      One of `.safetensors`, `.npz`, `.h5`, `.keras` and `.pth`, or `.index.json` for
      a list of files of these formats.

    Raises:
      UserError: There is no such file.
      UnreadableError: The content is known and has no weights that can be read: the
        file is empty, a web page, a pointer of Git LFS, compressed and so on.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}; check the path.")
    try:
        with path.open("rb") as file:
            start = file.read(512)
        size = path.stat().st_size
    except OSError as error:
        raise UnreadableError(
            f"{path} cannot be read: {error.strerror}. Check its permissions."
        ) from error
    if not start:
        raise UnreadableError(f"{path} is empty. {_FETCH_AGAIN}.")
    if is_index(path) and start.lstrip()[:1] == b"{":
        return INDEX
    if path.name.lower().endswith(".weights.json"):
        raise UnreadableError(
            f"{path} lists the parts of weights that Keras saved with max_shard_size,"
            " which are not read. Save them as one file, without that argument."
        )
    if start[8:9] == b"{":
        length = int.from_bytes(start[:8], "little")
        if length > size - 8:
            raise UnreadableError(
                f"{path} is cut off or damaged: its header claims {length} bytes, but"
                f" the file has {size}. {_FETCH_AGAIN}."
            )
        if length > MAX_HEADER:
            raise UnreadableError(
                f"{path} is refused: its header has {length} bytes, but names, shapes"
                f" and a card need at most {MAX_HEADER}. Save it again."
            )
        return SAFETENSORS
    if start.startswith(b"PK"):
        return _format_of_zip(path)
    if start[:1] == b"\x80" and start[1] in (2, 3, 4, 5):
        if _TORCH_MAGIC in start[:32]:
            return TORCH
        raise UnreadableError(
            f"{path} is refused: it is a pickle, which could run code, and torch.save"
            " did not write it. Save its arrays by their names with numpy.savez."
        )
    if h5py.is_hdf5(path):
        return H5
    for magic, program in _COMPRESSED:
        if start.startswith(magic):
            raise UnreadableError(
                f"{path} is compressed. Unpack it with {program}, and give the file"
                " inside."
            )
    if start[257:262] == b"ustar":
        raise UnreadableError(
            f"{path} is a tar archive. Unpack it with tar -x, and give the file inside;"
            " if torch wrote it, load it in torch and save it again."
        )
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for starts, what, advice in _OTHERS:
        if text.startswith(starts):
            raise UnreadableError(f"{path} {what}. {advice}.")
    return None


def is_index(path: Path) -> bool:
    """Returns whether the name of a file is that of a list of files."""
    return path.name.lower().endswith(INDEX)


def _format_of_zip(path: pathlib.Path) -> str:
    with open_zip(path) as archive:
        names = archive.namelist()
    files = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in files:
        raise UnreadableError(
            f"{path} is a program of TorchScript, which contains code. Load it in torch"
            " with torch.jit.load and save its model.state_dict()."
        )
    if "data.pkl" in files:
        return TORCH
    if KERAS_WEIGHTS in names:
        return KERAS
    if all(name.endswith(".npy") for name in names):
        return NPZ
    shown = ", ".join(map(repr, sorted(names)[:3]))
    raise UnreadableError(
        f"{path} is a zip archive of {shown[:200]} and not a file of weights. Unpack"
        " it, and give the file of weights inside."
    )


def open_zip(path: os.PathLike) -> zipfile.ZipFile:
    """Opens a zip archive of the kind in which libraries write weights.

    Raises:
      UnreadableError: The archive is damaged, or its entries are encrypted, have the
        same name, or are compressed by a method that no library uses for weights.
    """
    with explaining_damage(path):
        try:
            archive = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise UnreadableError(
                f"{path} is cut off or damaged: it begins as a zip archive, but has no"
                f" valid list of its content. {_FETCH_AGAIN}."
            ) from error
    entries, size = archive.infolist(), os.path.getsize(path)
    problem = ""
    if any(entry.flag_bits & 1 for entry in entries):
        problem = "its content is encrypted"
    elif len({entry.filename for entry in entries}) < len(entries):
        problem = "some of its entries have the same name"
    elif any(x.header_offset + x.compress_size > size for x in entries):
        problem = f"some of its entries claim more than the {size} bytes that it has"
    # Archives set how much memory the other methods take.
    elif {x.compress_type for x in entries} - {
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    }:
        problem = "it is compressed by another method than deflate"
    if problem:
        archive.close()
        raise UnreadableError(
            f"{path} is refused: {problem}. Save the weights again with the program"
            " that made them."
        )
    return archive
