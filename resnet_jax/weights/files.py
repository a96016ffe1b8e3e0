"""Reads and writes files of weights in any format, with their card.

A safetensors file has the card as JSON in its metadata. The card of a file NAME of
another format is in NAME.card.json beside it, and timm's `config.json` beside a file
serves as a card, too.
"""

import argparse
import contextlib
import functools
import io
import os
import pathlib
import pickle
import pickletools
import re
import types
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from resnet_jax.errors import UserError
from resnet_jax.models.zoo import Spec
from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import Path
from resnet_jax.weights import formats, keras_files
from resnet_jax.weights.card import Card, from_json, timm_card
from resnet_jax.weights.naming import Scheme
from resnet_jax.weights.recognition import flatten
from resnet_jax.weights.schemes import SCHEMES
from resnet_jax.weights.stored import (
    StoredTensor,
    UnreadableError,
    explaining_damage,
    parse_object,
    read_text,
)

TORCH = (".pth", ".pt", ".th", ".tar", ".bin", ".ckpt")
KERAS = (".h5", ".keras")
SUFFIXES = (".safetensors", *TORCH, ".npz", *KERAS)
# The first version of torch in which a file cannot run code while weights are read.
SAFE_TORCH = (2, 6)
# Functions that torch lets pickles call, and that make much of little.
MULTIPLYING = {
    "builtins bytearray",
    "__builtin__ bytearray",
    "torch._utils _rebuild_device_tensor_from_cpu_tensor",
    "torch._utils _rebuild_device_tensor_from_numpy",
}
# The largest number of tensors in a file, which may have an optimizer and several
# networks, and the largest length of a name.
MAX_TENSORS, MAX_NAME = 20_000, 1000
# The size of the header of an array in bytes, above which NumPy does not parse it.
MAX_NPY_HEADER = 10_100
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
      path: The file, whose content tells the format.
      spec: The network that is expected, which gives names to those layers of a Keras
        file that are only numbered.
      scheme: The naming scheme that is expected, for the same purpose.

    Raises:
      UserError: There is no such file, its format is unknown, it is damaged, or it
        cannot be read without running code that it contains.
    """
    match format_of(path):
        case formats.INDEX:
            return _read_shards(path, spec, scheme)
        case formats.SAFETENSORS:
            reader: Callable = _read_safetensors
        case formats.NPZ:
            reader = _read_npz
        case formats.TORCH:
            reader = _read_torch
        case _:
            reader = functools.partial(keras_files.read, spec=spec, scheme=scheme)
    with explaining_damage(path):
        tensors = reader(path)
    # Names are compared with those of many networks, which takes time.
    longest = max(map(len, tensors), default=0)
    if len(tensors) > MAX_TENSORS or longest > MAX_NAME:
        raise UserError(
            f"{path} is refused: it has {len(tensors)} tensors, with names of up to"
            f" {longest} characters. Save the weights of one network alone."
        )
    return tensors


def format_of(path: pathlib.Path) -> str:
    """Returns the suffix of a file's format, which its content tells (`formats.py`).

    Raises UserError if there is no such file, or if it is not a file of weights.
    """
    found = formats.format_of(path)
    if not found:
        check_suffix(path)
        raise UserError(
            f"{path} is not a file of weights, whatever its suffix says. Fetch or save"
            " it again."
        )
    return found


def read_card(path: pathlib.Path) -> Card | None:
    """Returns the card of a file, or None; raises UserError if the card is invalid."""
    if format_of(path) == formats.SAFETENSORS:
        with explaining_damage(path), safetensors.safe_open(path, "np") as file:
            metadata = file.metadata() or {}
        if "card" in metadata:
            return from_json(metadata["card"], str(path))
    if card_path(path).exists():
        return from_json(read_text(card_path(path)), str(path))
    config = path.with_name("config.json")
    if config.exists():
        content = parse_object(read_text(config), config)
        if "architecture" in content:
            try:
                return timm_card(content, str(path))
            except (
                *(ValueError, TypeError, LookupError, AttributeError, OverflowError),
                UserError,
            ) as error:
                lines = str(error).splitlines() or [type(error).__name__]
                reason = lines[0].rstrip(".?")
                if isinstance(error, KeyError):
                    reason = f"it has no {error}"
                raise UserError(
                    f"{config} does not describe weights of a network of the zoo as"
                    f" timm does ({reason}). Correct or remove it."
                ) from error
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
    suffix = suffix_of(path)
    try:
        if suffix == ".safetensors":
            # np.ascontiguousarray would give scalars an axis.
            arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
            # Some readers refuse files without torch's entry "format".
            metadata = {"format": "pt", "card": card.to_json()}
            safetensors.numpy.save_file(arrays, partial, metadata)
        elif suffix == ".npz":
            # NumPy would add its suffix to a path with another one, such as .NPZ.
            with partial.open("wb") as file:
                # NumPy's types expect a bool of any keyword, since allow_pickle is one.
                np.savez(file, **tensors)  # type: ignore[arg-type]
        elif suffix in KERAS:
            spec, scheme = card.make_spec(), SCHEMES[card.scheme]
            keras_files.write(partial, tensors, spec, scheme)
        else:
            torch = _import_torch(path, "Writing")
            state = {name: torch.tensor(value) for name, value in tensors.items()}
            torch.save(state, partial)
        storage.commit(partial, path)
        if suffix != ".safetensors":
            storage.write(card_path(path), card.to_json())
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

    Raises UserError if there is no such file.
    """
    if not path.is_file():
        raise UserError(f"There is no file {path}; check the path.")
    beside = [card_path(path), path.with_name("config.json")]
    if formats.is_index(path):
        beside += [path.with_name(shard) for shard in _shards(path).values()]
    with storage.local_files(path, *beside) as (copy, *_):
        yield copy


def card_path(path: Path) -> Path:
    """Returns the path of the card of a file whose format cannot contain it."""
    return path.with_name(path.name + ".card.json")


def suffix_of(path: Path) -> str:
    """Returns the suffix of a path in lower case."""
    return path.suffix.lower()


def check_suffix(path: Path) -> None:
    """Raises UserError if the suffix of a file is not that of a known format."""
    if suffix_of(path) not in SUFFIXES:
        raise UserError(
            f"The format of {path} is unknown. Give a file that ends in one of"
            f" {', '.join(SUFFIXES)}."
        )


def _shards(path: Path) -> dict[str, str]:
    """Returns the file of each tensor, as a list of files gives it.

    Raises UserError if it is not such a list, or names files of other directories.
    """
    files = parse_object(read_text(path), path).get("weight_map")
    if not isinstance(files, Mapping) or not files:
        raise UserError(
            f"{path} has no weight_map, which names the file of each tensor. Fetch it"
            " again."
        )
    for name in files.values():
        own = isinstance(name, str) and name == os.path.basename(name)
        if not own or name in ("", ".", ".."):
            raise UserError(
                f"{path} is refused: it names the file {name!r}, which is not in its"
                " own directory. Fetch it again."
            )
    return dict(files)


def _read_shards(
    path: pathlib.Path, spec: Spec | None, scheme: Scheme | None
) -> dict[str, StoredTensor]:
    files = _shards(path)
    shards = {}
    for file in sorted(set(files.values())):
        shard = path.with_name(file)
        if not shard.is_file():
            raise UserError(
                f"{shard} is missing, which {path.name} names. Fetch it as well."
            )
        if formats.is_index(shard):
            raise UserError(f"{path} is refused: it names the list {file!r} as a file.")
        shards[file] = read(shard, spec, scheme)
    for name, file in files.items():
        if name not in shards[file]:
            raise UserError(
                f"{path.with_name(file)} has no tensor {name!r}, which {path.name} says"
                " is in it. Fetch both again."
            )
    return {name: shards[file][name] for name, file in files.items()}


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
    archive = formats.open_zip(path)
    tensors = {}
    for entry in archive.namelist():
        name = entry.removesuffix(".npy")
        with archive.open(entry) as file:
            shape, dtype = _read_npy_header(io.BytesIO(file.read(MAX_NPY_HEADER)))
        if dtype.hasobject:
            raise UnreadableError(
                f"{path} is refused: {name!r} is a pickle, which could run code,"
                " instead of an array of numbers. Save it without objects."
            )
        read = functools.partial(_read_npy, archive, entry)
        tensors[name] = StoredTensor(path, name, shape, dtype.name, read)
    return tensors


def _read_npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    try:
        shape, _, dtype = read_header(file)
    # Python's parser raises these for expressions that are nested too deeply.
    except (MemoryError, RecursionError):
        raise ValueError("the header of an array is nested too deeply") from None
    return shape, dtype


def _read_npy(archive: zipfile.ZipFile, entry: str) -> np.ndarray:
    with archive.open(entry) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _read_torch(path: pathlib.Path) -> dict[str, StoredTensor]:
    torch = _import_torch(path, "Reading")
    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise UnreadableError(
            f"{path} is not read with torch {torch.__version__}, in which files can run"
            " code although only weights are read (CVE-2025-32434). Run pip install"
            f" 'torch>={'.'.join(map(str, SAFE_TORCH))}', or convert the file to"
            " .safetensors on a machine with that version (python -m"
            " resnet_jax.convert)."
        )
    _check_pickles(path)

    def load() -> Mapping[str, Any]:
        return _named_tensors(torch, path, _load_torch(torch, path))

    with torch.serialization.skip_data():
        tensors = load()
    # All values are read for the first one.
    whole = functools.cache(load)

    def read(name: str) -> np.ndarray:
        value = whole()[name].detach()
        # NumPy has no bfloat16.
        return (value.float() if value.is_floating_point() else value).numpy()

    return {
        name: StoredTensor(
            path,
            name,
            tuple(value.shape),
            _torch_type(torch, value),
            functools.partial(read, name),
        )
        for name, value in tensors.items()
    }


def _check_pickles(path: pathlib.Path) -> None:
    """Raises UserError if a file of torch could take more memory than its own size."""
    with contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(formats.open_zip(path))
            entries = {x.filename.rpartition("/")[2]: x for x in archive.infolist()}
            if any(x.compress_type != zipfile.ZIP_STORED for x in entries.values()):
                raise UnreadableError(
                    f"{path} is refused: it is compressed, and torch.save compresses"
                    " nothing. Load it in torch and save it again with torch.save."
                )
            order = entries.get("byteorder")
            # torch would swap the bytes of values that are not read.
            if order and archive.open(order).read(10) != b"little":
                raise UnreadableError(
                    f"{path} is refused: its bytes are in another order than those of"
                    " this machine. Load it in torch and save it with safetensors."
                )
            file = stack.enter_context(archive.open(entries["data.pkl"]))
            count = 1
        else:
            file = stack.enter_context(path.open("rb"))
            # The tensors follow three pickles about the program that wrote them.
            count = 4
        for _ in range(count):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL" and argument in MULTIPLYING:
                    raise UnreadableError(
                        f"{path} is refused: its pickle calls {argument.split()[-1]},"
                        " which tensors do not need. If you trust it, load it in torch"
                        " and save model.state_dict() with torch.save."
                    )


def _load_torch(torch: types.ModuleType, path: pathlib.Path) -> Any:
    try:
        # Checkpoints of timm's and torchvision's training contain their arguments as
        # a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError) as error:
        raise UnreadableError(
            f"{path} is not a complete file of torch.save; fetch or save it again."
        ) from error
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        kind = match[1] if match else "another object"
        raise UnreadableError(
            f"{path} is refused: besides tensors it contains a pickle of {kind}, which"
            " could run code. If you trust it, load it in torch and save the tensors"
            " alone with torch.save(model.state_dict(), PATH)."
        ) from error


def _named_tensors(
    torch: types.ModuleType, path: pathlib.Path, content: Any
) -> dict[str, Any]:
    """Returns the tensors that the content of a file of torch has under names."""
    if not isinstance(content, Mapping):
        raise UnreadableError(
            f"{path} contains a {type(content).__name__} instead of named tensors. Save"
            " them with torch.save(model.state_dict(), PATH)."
        )
    return flatten(content, torch.Tensor)


def _torch_type(torch: types.ModuleType, value: Any) -> str:
    """Returns the type of a tensor's values, or its kind if it has no plain values."""
    if value.is_meta:
        return "meta"
    kind = value.dtype if value.layout == torch.strided else value.layout
    return str(kind).removeprefix("torch.")


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
