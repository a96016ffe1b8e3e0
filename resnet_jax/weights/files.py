"""Files of weights: names and arrays, whatever the format, with their card.

safetensors keep the card as JSON among their metadata; beside a file NAME of another
format it is in NAME.card.json. timm's `config.json` beside a file does as well.
"""

import argparse
import contextlib
import json
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping

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

Tensors = Mapping[str, np.ndarray]

TORCH = (".pth", ".pt", ".th", ".tar", ".bin")
KERAS = (".h5", ".keras")
SUFFIXES = (".safetensors", *TORCH, ".npz", *KERAS)
# Where training programs keep the weights in a checkpoint, the averaged ones first.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
# What torch.nn.DataParallel and torch.compile put before each name.
PREFIXES = ("module.", "_orig_mod.")


def read(
    path: pathlib.Path, spec: Spec | None = None, scheme: Scheme | None = None
) -> dict[str, np.ndarray]:
    """Returns the tensors of a file.

    Raises UserError if there is no such file, or it cannot be read without running
    code that it holds.

    Args:
      path: of the file; its suffix says what it is.
      spec, scheme: what is expected, for those of Keras's files that only number
        their layers.
    """
    _check(path)
    with _telling_failure(path):
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, "np") as file:
                return {name: file.get_tensor(name) for name in file.offset_keys()}
        if path.suffix == ".npz":
            return _read_npz(path)
        if path.suffix in KERAS:
            return keras_files.read(path, spec, scheme)
        return _read_torch(path)


def read_card(path: pathlib.Path) -> Card | None:
    """Returns the card of a file, if it has one; raises UserError if it is broken."""
    _check(path)
    with _telling_failure(path):
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


def write(path: Path, tensors: Tensors, card: Card) -> None:
    """Writes tensors, named by the card's scheme, so that the file is whole or not.

    Raises UserError if the file system refuses.
    """
    check_suffix(path)
    if storage.is_remote(path):
        with storage.local_folder(path.parent) as folder:
            write(folder / path.name, tensors, card)
        return
    if not path.parent.is_dir():
        raise UserError(f"There is no directory {path.parent}.")
    torch = _import_torch(path, "Writing") if path.suffix in TORCH else None
    # The suffix stays: some writers go by it.
    partial = path.with_name(f".partial-{path.name}")
    try:
        if path.suffix == ".safetensors":
            # Not ascontiguousarray, which gives numbers an axis.
            arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
            # As torch's own files say, without which some readers refuse them.
            metadata = {"format": "pt", "card": card.to_json()}
            safetensors.numpy.save_file(arrays, partial, metadata)
        elif path.suffix == ".npz":
            np.savez(partial, **tensors)
        elif path.suffix in KERAS:
            spec, scheme = card.make_spec(), SCHEMES[card.scheme]
            keras_files.write(partial, tensors, spec, scheme)
        else:
            theirs = {name: torch.tensor(value) for name, value in tensors.items()}
            torch.save(theirs, partial)
        os.replace(partial, path)
        if path.suffix != ".safetensors":
            card_path(path).write_text(card.to_json())
    # safetensors and torch have types of their own for what the file system refuses.
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def local(path: Path) -> Iterator[pathlib.Path]:
    """A file with what tells of it beside it, copied if it is in an object store.

    Raises UserError if there is no such file.
    """
    _check(path)
    beside = (card_path(path), path.with_name("config.json"))
    with storage.local_files(path, *beside) as (copy, *_):
        yield copy


def card_path(path: Path) -> Path:
    """Where the card lies of a file whose format has no room for it."""
    return path.with_name(path.name + ".card.json")


def _check(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    check_suffix(path)


def check_suffix(path: Path) -> None:
    """Raises UserError if no format has the suffix of a file."""
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"What is {path}? Files of weights end in {', '.join(SUFFIXES)}."
        )


@contextlib.contextmanager
def _telling_failure(path: pathlib.Path):
    try:
        yield
    except (UserError, MemoryError):
        raise
    # Broken files raise whatever their readers come upon.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason.rstrip('.')}.") from error


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is no archive of numpy arrays.")
    tensors = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            try:
                value = file[name]
            except ValueError as error:
                if "allow_pickle" not in str(error):
                    raise
                raise UserError(
                    f"{path} is refused: {name!r} is no array of numbers but a pickle,"
                    " which could run code."
                ) from None
            # Some of BiT's files keep the parameters of norms as if they were images.
            norm = name.endswith(("/gamma", "/beta"))
            tensors[name] = value.reshape(-1) if norm else value
    return tensors


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    torch = _import_torch(path, "Reading")
    try:
        # Checkpoints of timm's and torchvision's training hold their arguments so.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError) as error:
        raise UserError(f"{path} is no whole file of torch.save.") from error
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = found[1] if found else "something else"
        raise UserError(
            f"{path} is refused: besides tensors it holds a pickle of {what}, which"
            " could run code; whoever trusts it saves the tensors alone with"
            " torch.save(model.state_dict(), PATH)."
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, no named tensors.")
    tensors = unwrap(content)
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}, no tensor.")
        value = value.detach()
        # numpy has no bfloat16.
        tensors[name] = (value.float() if value.is_floating_point() else value).numpy()
    return tensors


def unwrap(checkpoint: Mapping) -> dict:
    """Returns the state dict of a checkpoint, with the networks' own names."""
    for key in WRAPPERS:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    # What torch counts in an averaged model.
    tensors = {name: x for name, x in checkpoint.items() if name != "n_averaged"}
    # Wrappers may be around each other, in either order.
    for prefix in PREFIXES * 2:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return tensors


def _import_torch(path: pathlib.Path, doing: str):
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{doing} {path} takes torch, which is not installed: pip install torch, or"
            " convert between it and .safetensors once where torch is (python -m"
            " resnet_jax.convert)."
        ) from None
    return torch
