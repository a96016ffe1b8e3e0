"""Reads and writes Keras's weight files with h5py, without Keras.

There are three kinds. A legacy `.h5` has a group for each layer under the layer's name.
A `.weights.h5` of Keras 3 has groups by class and number, `layers/conv2d_3/vars/0`, and
since Keras 3.6 the layer's name as an attribute. A `.keras` is a zip of the network's
config and a `.weights.h5`.
"""

import collections
import functools
import io
import os
import pathlib
import re
import zipfile
from collections.abc import Iterator, Mapping

import h5py
import jax.numpy as jnp
import numpy as np

from resnet_jax.errors import UserError, nearest
from resnet_jax.models.zoo import Spec
from resnet_jax.weights.keras import VARIABLES, Layer, list_layers
from resnet_jax.weights.naming import Scheme
from resnet_jax.weights.stored import StoredTensor

# Keras's automatic name of a layer: its class and, after the first one, a number.
UNNAMED = rf"({'|'.join(VARIABLES)})(?:_(\d+))?"
# The files of Keras Applications keep the head under its first name.
FORMER = {"probs": "predictions"}

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
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        tensors = _read(path)
    except Exception as error:
        # h5py raises almost any exception for damaged files.
        raise UserError(
            f"{path} is damaged or not a Keras weight file; fetch or save it again."
        ) from error
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
    if path.suffix != ".h5":
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
            if path.name.endswith(".weights.h5"):
                _write_keras_3(file, layers, tensors)
            else:
                _write_legacy(file, layers, tensors)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> Tensors:
    if not zipfile.is_zipfile(path):
        return _read_h5(path, h5py.File(path))
    with zipfile.ZipFile(path) as archive:
        content = io.BytesIO(archive.read("model.weights.h5"))
    return _read_h5(path, h5py.File(content))


def _read_h5(path: pathlib.Path, file: h5py.File) -> Tensors:
    # A whole model in the legacy format has its optimizer beside this group.
    root = file.get("model_weights", file)
    if any(name.startswith("layer_names") for name in root.attrs):
        return dict(_read_legacy(path, root))
    return dict(_read_keras_3(path, file["layers"])) if "layers" in file else {}


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
    file: pathlib.Path, layers: h5py.Group
) -> Iterator[tuple[str, StoredTensor]]:
    for path, value in _arrays(file, layers).items():
        place, _, number = path.rpartition("/")
        automatic = place.removesuffix("/vars").rpartition("/")[2]
        layer = layers[place].attrs.get("name", automatic)
        if match := re.fullmatch(UNNAMED, automatic):
            variable = VARIABLES[match[1]][int(number)]
        else:
            variable = number
        yield f"{layer}/{variable}", value


def _arrays(file: pathlib.Path, group: h5py.Group) -> Tensors:
    """Returns all arrays below a group by their paths in it."""
    arrays: Tensors = {}

    def visit(path: str, item: h5py.HLObject) -> None:
        if isinstance(item, h5py.Dataset):
            # HDF5 has no bfloat16, so Keras writes the bytes.
            kind = "bfloat16" if _is_bfloat16(item) else item.dtype.name
            read = functools.partial(_read_dataset, item)
            arrays[path] = StoredTensor(file, item.name, item.shape, kind, read)

    group.visititems(visit)
    return arrays


def _read_dataset(dataset: h5py.Dataset) -> np.ndarray:
    value = dataset[()]
    return value.view(jnp.bfloat16) if _is_bfloat16(dataset) else value


def _is_bfloat16(dataset: h5py.Dataset) -> bool:
    return dataset.attrs.get("dtype") == "bfloat16"


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
    known = list_layers(spec, scheme)
    for kind, unnamed in numbers.items():
        free = [x.name for x in known if x.kind == kind and x.name not in layers]
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
