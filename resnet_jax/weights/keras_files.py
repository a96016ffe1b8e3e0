"""Reads and writes Keras's weight files with h5py, without Keras.

There are three kinds. A legacy `.h5` has a group for each layer under the layer's name.
A `.weights.h5` of Keras 3 has groups by class and number, `layers/conv2d_3/vars/0`, and
since Keras 3.6 the layer's name as an attribute. A `.keras` is a zip of the network's
config and a `.weights.h5`.
"""

import collections
import functools
import io
import math
import os
import pathlib
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import jax.numpy as jnp
import numpy as np
from h5py import h5d, h5z

from resnet_jax.errors import UserError, nearest
from resnet_jax.models.zoo import Spec
from resnet_jax.weights import formats
from resnet_jax.weights.naming import Scheme, check_buildable
from resnet_jax.weights.schemes.keras import VARIABLES, Layer, list_layers
from resnet_jax.weights.stored import StoredTensor, UnreadableError, explaining_damage

# Keras's automatic name of a layer: its class and, after the first one, a number.
UNNAMED = rf"({'|'.join(VARIABLES)})(?:_(\d+))?"
# The files of Keras Applications keep the head under its first name.
FORMER = {"probs": "predictions"}

# A compressed file of weights may have this many bytes, or be this many times as large
# as what it was compressed to: few weights can be compressed by more than a tenth.
MAX_UNPACKED, MAX_RATIO = 2**26, 20
# The size of a chunk in bytes which every dataset may have.
MAX_CHUNK = 2**20
# The largest number of groups in each other, of which a network in a network has four.
MAX_DEPTH = 50
# The filters that give no more bytes than they take, and gzip.
FILTERS = {h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32}

Tensors = dict[str, StoredTensor]


def read(
    path: str | os.PathLike,
    spec: Spec | None = None,
    scheme: Scheme | None = None,
) -> Tensors:
    """Returns the tensors of a Keras file by names such as `conv1_conv/kernel`.

    Args:
      path: A file of any of the three kinds.
      spec: The network that is expected. Layers that only have automatic names get
        its names by their order, as in Keras. None: they keep the automatic names, such
        as `conv2d_3/kernel`.
      scheme: The naming scheme of the network.

    Raises:
      UserError: There is no such file, it is damaged or of another kind, or it has
        another number of unnamed layers than the network.
    """
    path = pathlib.Path(path)
    with explaining_damage(path):
        tensors = _read_h5(path, _open(path))
    if not tensors:
        raise UserError(
            f"{path} is not a Keras weight file, since it has no layers; give a file of"
            " model.save_weights or model.save."
        )
    return _name(tensors, path, spec, scheme) if spec and scheme else tensors


def write(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    spec: Spec,
    scheme: Scheme,
) -> None:
    """Writes a file that `model.load_weights` of Keras reads.

    Args:
      path: The file, which ends in `.weights.h5` (Keras 3) or `.h5` (legacy).
      tensors: All of the network's tensors, as `to_foreign` returns them.
      spec: The network that they belong to.
      scheme: The naming scheme of the network.

    Raises:
      UserError: The path has another suffix, or a tensor is missing.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() != ".h5":
        raise UserError(
            f"Weights for Keras cannot be written as {path.suffix!r}: give a name that"
            " ends in .weights.h5, which model.load_weights takes."
        )
    layers = list_layers(spec, scheme)
    for name in (f"{layer.name}/{v}" for layer in layers for v in layer.variables):
        if name not in tensors:
            raise UserError(f"The tensor {name!r} is missing.{nearest(name, tensors)}")

    # The file is renamed when it is complete, so it exists completely or not at all.
    partial = path.with_name(path.name + ".partial")
    try:
        with h5py.File(partial, "w") as file:
            if path.name.lower().endswith(".weights.h5"):
                _write_keras_3(file, layers, tensors)
            else:
                _write_legacy(file, layers, tensors)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _open(path: pathlib.Path) -> h5py.File:
    format = formats.format_of(path)
    if format == formats.H5:
        return h5py.File(path)
    if format != formats.KERAS:
        raise UserError(f"{path} is not a Keras weight file.")
    archive = formats.open_zip(path)
    entry = archive.getinfo(formats.KERAS_WEIGHTS)
    if entry.compress_type == zipfile.ZIP_STORED:
        return h5py.File(io.BufferedReader(_Part(path, entry)))
    # Keras compresses nothing. HDF5 reads here and there, so all is unpacked at first.
    packed = min(entry.compress_size, path.stat().st_size)
    if entry.file_size > max(MAX_UNPACKED, MAX_RATIO * packed):
        raise UnreadableError(
            f"{path} is refused: {entry.filename} in it claims {entry.file_size} bytes,"
            f" but no weights of that size are compressed to {packed}. Save it again."
        )
    return h5py.File(io.BytesIO(archive.read(entry)))


class _Part(io.RawIOBase):
    """The bytes of an entry of a zip archive that is not compressed."""

    def __init__(self, path: pathlib.Path, entry: zipfile.ZipInfo):
        self.file = path.open("rb")
        # The lengths of the name and of the extra field follow 26 bytes of the header.
        self.file.seek(entry.header_offset + 26)
        lengths = struct.unpack("<HH", self.file.read(4))
        self.start = entry.header_offset + 30 + sum(lengths)
        self.size = entry.file_size
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origins = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.size}
        return self.file.seek(self.start + origins[whence] + offset) - self.start

    def tell(self) -> int:
        return self.file.tell() - self.start

    def readinto(self, buffer: Any) -> int:
        content = self.file.read(max(0, min(len(buffer), self.size - self.tell())))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self.file.close()
        super().close()


def _read_h5(path: pathlib.Path, file: h5py.File) -> Tensors:
    if problem := file.visititems_links(_problem_of_link):
        raise UnreadableError(
            f"{path} is refused: {problem}. Save it again with Keras."
        )
    # A whole model in the legacy format has its optimizer beside this group.
    root = file.get("model_weights", file)
    if any(name.startswith("layer_names") for name in root.attrs):
        return dict(_read_legacy(path, root))
    return dict(_read_keras_3(path, file))


def _problem_of_link(name: str, link: object) -> str | None:
    """Returns the reason for which a link in a file is refused, or None."""
    # It could lead to any file of the user.
    if isinstance(link, h5py.SoftLink | h5py.ExternalLink):
        return (
            f"{name!r} in it is a link to {link.path!r}, and a file of weights must"
            " contain its tensors itself"
        )
    # The time that h5py takes grows with the square of the depth.
    if name.count("/") > MAX_DEPTH:
        return f"it has more than {MAX_DEPTH} groups in each other"
    return None


def _read_legacy(
    file: pathlib.Path, root: h5py.Group
) -> Iterator[tuple[str, StoredTensor]]:
    for name, group in root.items():
        arrays = _arrays(file, group)
        # The group of a network inside the network has several layers. In a group of
        # one layer the group's name counts, since TensorFlow 1 numbered the inner name.
        nested = len({path.rpartition("/")[0] for path in arrays}) > 1
        for path, value in arrays.items():
            *_, layer, variable = f"{name}/{path}".split("/")
            layer = layer if nested else name
            yield f"{FORMER.get(layer, layer)}/{variable.partition(':')[0]}", value


def _read_keras_3(
    file: pathlib.Path, root: h5py.Group
) -> Iterator[tuple[str, StoredTensor]]:
    for path, value in _arrays(file, root).items():
        place, _, number = path.rpartition("/")
        # The networks in a subclassed one have groups beside its own layers.
        if not place.endswith("/vars") or path.startswith("optimizer/"):
            continue
        automatic = place.removesuffix("/vars").rpartition("/")[2]
        layer = _text(root[place], "name") or automatic
        if match := re.fullmatch(UNNAMED, automatic):
            variable = VARIABLES[match[1]][int(number)]
        else:
            variable = number
        yield f"{layer}/{variable}", value


def _arrays(file: pathlib.Path, group: h5py.Group) -> Tensors:
    """Returns all arrays below a group by their paths in it."""
    arrays: Tensors = {}

    def visit(path: str, item: h5py.HLObject) -> None:
        # A dataset without a shape is empty.
        if not isinstance(item, h5py.Dataset) or item.shape is None:
            return
        if item.external or item.is_virtual:
            raise UnreadableError(
                f"{file} is refused: the values of {item.name!r} are in other files,"
                " and a file of weights must contain its tensors itself. Save it again"
                " with Keras."
            )
        try:
            kind = item.dtype.name
        except TypeError:
            kind = "unknown"
        # HDF5 has no bfloat16, so Keras writes the bytes.
        if _text(item, "dtype") == "bfloat16" and item.dtype.itemsize == 2:
            kind = "bfloat16"
        read = functools.partial(_read_dataset, item, kind)
        arrays[path] = StoredTensor(file, item.name, item.shape, kind, read)

    group.visititems(visit)
    return arrays


def _text(item: h5py.HLObject, name: str) -> str:
    """Returns an attribute that is a single string, or an empty string."""
    if name not in item.attrs or item.attrs.get_id(name).shape != ():
        return ""
    value = item.attrs[name]
    return value if isinstance(value, str) else ""


def _read_dataset(dataset: h5py.Dataset, kind: str) -> np.ndarray:
    if dataset.chunks:
        _check_chunks(dataset)
    value = dataset[()]
    return value.view(jnp.bfloat16) if kind == "bfloat16" else value


def _check_chunks(dataset: h5py.Dataset) -> None:
    """Raises ValueError if a chunk takes more memory than the dataset has.

    HDF5 unpacks a chunk as a whole, before it compares its size with the declared one.
    """
    size = math.prod(dataset.chunks) * dataset.dtype.itemsize
    if size > max(dataset.nbytes, MAX_CHUNK):
        raise ValueError(
            f"{dataset.name} has chunks of {size} bytes for {dataset.nbytes} bytes"
        )
    layout = dataset.id.get_create_plist()
    filters = [layout.get_filter(i)[0] for i in range(layout.get_nfilters())]
    if set(filters) - FILTERS or filters.count(h5z.FILTER_DEFLATE) > 1:
        raise ValueError(
            f"{dataset.name} is compressed by another method than gzip, which"
            " h5repack -f NONE undoes"
        )

    def check(chunk: h5d.StoreInfo) -> None:
        _, packed = dataset.id.read_direct_chunk(chunk.chunk_offset)
        content = zlib.decompressobj().decompress(packed, size + 1)
        if len(content) > size:
            raise ValueError(f"a chunk of {dataset.name} has more than {size} bytes")

    if h5z.FILTER_DEFLATE in filters:
        dataset.id.chunk_iter(check)


def _name(tensors: Tensors, path: pathlib.Path, spec: Spec, scheme: Scheme) -> Tensors:
    """Gives unnamed layers their names, in the order of their numbers."""
    numbers: dict[str, dict[str, int]] = collections.defaultdict(dict)
    layers = {name.rpartition("/")[0] for name in tensors}
    for layer in layers:
        if match := re.fullmatch(UNNAMED, layer):
            numbers[match[1]][layer] = int(match[2] or 0)
    if not numbers:
        return tensors

    names: dict[str, str] = {}
    check_buildable(spec, tensors, path)
    known = list_layers(spec, scheme)
    for kind, unnamed in numbers.items():
        free = [x.name for x in known if x.kind == kind and x.name not in layers]
        if kind == "dense" and len(free) != len(unnamed):
            # These layers follow the network in another one, in place of its head.
            continue
        if len(free) != len(unnamed):
            raise UserError(
                f"{path} has {len(unnamed)} unnamed layers of the class {kind}, but the"
                f" network has {len(free)}. Name the network that the file belongs to."
            )
        names |= zip(
            sorted(unnamed, key=lambda layer: unnamed[layer]), free, strict=True
        )
    return {
        f"{names.get(layer, layer)}/{variable}": value
        for name, value in tensors.items()
        for layer, _, variable in [name.rpartition("/")]
    }


def _write_legacy(file: h5py.File, layers: list[Layer], tensors: Mapping) -> None:
    file.attrs["layer_names"] = np.array([layer.name.encode() for layer in layers])
    for layer in layers:
        group = file.create_group(layer.name)
        names = [f"{layer.name}/{variable}" for variable in layer.variables]
        group.attrs["weight_names"] = np.array([name.encode() for name in names])
        for name in names:
            group[name] = tensors[name]


def _write_keras_3(file: h5py.File, layers: list[Layer], tensors: Mapping) -> None:
    counts: collections.Counter[str] = collections.Counter()
    for layer in layers:
        number = f"_{counts[layer.kind]}" if counts[layer.kind] else ""
        counts[layer.kind] += 1
        group = file.create_group(f"layers/{layer.kind}{number}/vars")
        group.attrs["name"] = layer.name
        for i, variable in enumerate(layer.variables):
            group[str(i)] = tensors[f"{layer.name}/{variable}"]
