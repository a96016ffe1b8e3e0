"""Reads and writes files of weights in any format, with their card.

A safetensors file has the card as JSON in its metadata. The card of a file NAME of
another format is in NAME.card.json beside it, and timm's `config.json` beside a file
serves as a card, too.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import pathlib
import pickle
import re
import types
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from resnet_jax.errors import UserError
from resnet_jax.models.zoo import Spec
from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import Path
from resnet_jax.weights import SCHEMES, keras_files
from resnet_jax.weights.card import Card, from_json, timm_card
from resnet_jax.weights.naming import Scheme
from resnet_jax.weights.recognition import flatten
from resnet_jax.weights.stored import StoredTensor, explaining_damage

TORCH = (".pth", ".pt", ".th", ".tar", ".bin")
KERAS = (".h5", ".keras")
SUFFIXES = (".safetensors", *TORCH, ".npz", *KERAS)
# The names of NumPy's types for those of safetensors.
_SAFETENSORS_TYPES = {
    "BF16": "bfloat16",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


def read(
    path: pathlib.Path, spec: Spec | None = None, scheme: Scheme | None = None
) -> dict[str, StoredTensor]:
    """Returns the tensors of a file by their names in it.

    Only headers are read, so the file may claim any sizes: compare the shapes with a
    network before a tensor is made an array, which reads its values.

    Args:
      path: The file, whose suffix names the format.
      spec: The network that is expected, which gives names to those layers of a Keras
        file that are only numbered.
      scheme: The naming scheme that is expected, for the same purpose.

    Raises:
      UserError: There is no such file, its format is unknown, it is damaged, or it
        cannot be read without running code that it contains.
    """
    _check(path)
    with explaining_damage(path):
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix == ".npz":
            return _read_npz(path)
        if path.suffix in KERAS:
            return keras_files.read(path, spec, scheme)
        return _read_torch(path)


def read_card(path: pathlib.Path) -> Card | None:
    """Returns the card of a file, or None; raises UserError if the card is invalid."""
    _check(path)
    with explaining_damage(path):
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "np") as file:
                metadata = file.metadata() or {}
            if "card" in metadata:
                return from_json(metadata["card"], str(path))
        if card_path(path).exists():
            return from_json(card_path(path).read_text(), str(path))
        config = path.with_name("config.json")
        if config.exists():
            content = json.loads(config.read_text())
            if "architecture" in content:
                return timm_card(content, str(path))
    return None


def write(path: Path, tensors: Mapping[str, np.ndarray], card: Card) -> None:
    """Writes a file of weights, which exists completely or not at all, and its card.

    Args:
      path: The file, whose suffix names the format.
      tensors: The arrays by their names in the card's naming scheme.
      card: The card.

    Raises:
      UserError: The format is unknown, the package that writes it is missing, or the
        file cannot be written.
    """
    check_suffix(path)
    if storage.is_remote(path):
        with storage.local_folder(path.parent) as folder:
            write(folder / path.name, tensors, card)
        return
    if not path.parent.is_dir():
        raise UserError(f"There is no directory {path.parent}; create it first.")
    # The suffix is kept, since some writers choose the format by it.
    partial = path.with_name(f".partial-{path.name}")
    try:
        if path.suffix == ".safetensors":
            # np.ascontiguousarray would give scalars an axis.
            arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
            # Some readers refuse files without torch's entry "format".
            metadata = {"format": "pt", "card": card.to_json()}
            safetensors.numpy.save_file(arrays, partial, metadata)
        elif path.suffix == ".npz":
            # NumPy's types expect a bool of any keyword, since allow_pickle is one.
            np.savez(partial, **tensors)  # type: ignore[arg-type]
        elif path.suffix in KERAS:
            spec, scheme = card.make_spec(), SCHEMES[card.scheme]
            keras_files.write(partial, tensors, spec, scheme)
        else:
            torch = _import_torch(path, "Writing")
            state = {name: torch.tensor(value) for name, value in tensors.items()}
            torch.save(state, partial)
        os.replace(partial, path)
        if path.suffix != ".safetensors":
            card_path(path).write_text(card.to_json())
    # safetensors and torch raise errors of their own for those of the file system.
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be written: {error}. Free some space, or choose another"
            " path."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def local(path: Path) -> Iterator[pathlib.Path]:
    """Yields a local path of a file and of the cards beside it.

    Files in an object store are copied for as long as the context is open.

    Raises UserError if there is no such file, or its format is unknown.
    """
    _check(path)
    beside = (card_path(path), path.with_name("config.json"))
    with storage.local_files(path, *beside) as (copy, *_):
        yield copy


def card_path(path: Path) -> Path:
    """Returns the path of the card of a file whose format cannot contain it."""
    return path.with_name(path.name + ".card.json")


def _check(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"There is no file {path}; check the path.")
    check_suffix(path)


def check_suffix(path: Path) -> None:
    """Raises UserError if the suffix of a file is not that of a known format."""
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"The format of {path} is unknown. Give a file that ends in one of"
            f" {', '.join(SUFFIXES)}."
        )


def _read_safetensors(path: pathlib.Path) -> dict[str, StoredTensor]:
    file = safetensors.safe_open(path, "np")
    tensors = {}
    for name in file.offset_keys():
        header = file.get_slice(name)
        tensors[name] = StoredTensor(
            path,
            name,
            tuple(header.get_shape()),
            _SAFETENSORS_TYPES.get(header.get_dtype(), header.get_dtype()),
            functools.partial(file.get_tensor, name),
        )
    return tensors


def _read_npz(path: pathlib.Path) -> dict[str, StoredTensor]:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not an archive of numpy.savez; save it again.")
    archive = zipfile.ZipFile(path)
    tensors = {}
    for entry in archive.namelist():
        name = entry.removesuffix(".npy")
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise UserError(
                f"{path} is refused: {name!r} is a pickle, which could run code,"
                " instead of an array of numbers. Save it without objects."
            )
        # Some of BiT's files keep the parameters of norms as [1, 1, 1, c].
        if name.endswith(("/gamma", "/beta")):
            shape = (math.prod(shape),)
        read = functools.partial(_read_npy, archive, entry, shape)
        tensors[name] = StoredTensor(path, name, shape, dtype.name, read)
    return tensors


def _read_npy(
    archive: zipfile.ZipFile, entry: str, shape: tuple[int, ...]
) -> np.ndarray:
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False).reshape(shape)


def _read_torch(path: pathlib.Path) -> dict[str, StoredTensor]:
    torch = _import_torch(path, "Reading")
    try:
        # Checkpoints of timm's and torchvision's training contain their arguments as
        # a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Files of torch before 1.6 cannot be mapped.
            content = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path),
            )
    except (RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is not a complete file of torch.save; fetch or save it again."
        ) from error
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        kind = match[1] if match else "another object"
        raise UserError(
            f"{path} is refused: besides tensors it contains a pickle of {kind}, which"
            " could run code. If you trust it, load it in torch and save the tensors"
            " alone with torch.save(model.state_dict(), PATH)."
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} contains a {type(content).__name__} instead of named tensors. Save"
            " them with torch.save(model.state_dict(), PATH)."
        )
    tensors = {}
    for name, value in flatten(content, torch.Tensor).items():
        tensors[name] = StoredTensor(
            path,
            name,
            tuple(value.shape),
            str(value.dtype).removeprefix("torch."),
            functools.partial(_read_torch_tensor, value.detach()),
        )
    return tensors


def _read_torch_tensor(value: Any) -> np.ndarray:
    # NumPy has no bfloat16. The copy remains if the file that is mapped changes.
    number = value.float() if value.is_floating_point() else value
    return number.clone().numpy()


def _import_torch(path: Path, task: str) -> types.ModuleType:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{task} {path} needs torch, which is not installed. Run pip install torch,"
            " or convert between this format and .safetensors on a machine with torch"
            " (python -m resnet_jax.convert)."
        ) from None
    return torch
