"""Writes hostile files of weights, and measures how they are refused.

`CASES` has a writer for each file and a pattern of the sentence that refuses it. As a
program, it loads all files in a process whose memory is limited:

    python -m tests.helpers.hostile_weights DIRECTORY

It prints a line of JSON per case: the error's type, its message, and by how many MiB
the peak of the resident memory grew.
"""

import json
import pathlib
import pickle
import re
import resource
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import h5py
import numpy as np
import safetensors.numpy

from resnet_jax.errors import UserError
from resnet_jax.weights import files
from resnet_jax.weights.card import Card
from resnet_jax.weights.load import load
from resnet_jax.weights.save import save
from tests.helpers import small_networks

# By how many MiB the memory of the process may grow while all files are refused; the
# networks have less than one MiB.
GROWTH = 64
HUGE = 10**12
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 102469840\n"
HTML = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


class Case(NamedTuple):
    """A hostile file.

    Attributes:
      write: Writes the file, given a path in an empty directory.
      pattern: A pattern that is in the sentence which refuses the file.
      name: The name of the file.
      model: The network that is named when the file is loaded.
    """

    write: Callable[[pathlib.Path], None]
    pattern: str
    name: str
    model: str | None = None


CASES: dict[str, Case] = {}


def case(
    name: str,
    pattern: str,
    model: str | None = None,
    cases: dict[str, Case] = CASES,
) -> Callable:
    """Registers the decorated writer of a hostile file under the writer's name."""

    def register(write: Callable[[pathlib.Path], None]) -> Callable:
        cases[write.__name__] = Case(write, pattern, name, model)
        return write

    return register


def network(kind: str) -> str:
    """Returns the network whose weights are written in a format."""
    return "keras_resnet50" if kind in ("h5", "keras") else "test_resnet"


def valid(path: pathlib.Path) -> Card:
    """Writes a valid file of a small network with its card beside it."""
    kind = path.suffix.lower().strip(".")
    card, variables = small_networks.card_and_variables(network(kind))
    if kind == "keras":
        inner = path.with_name("model.weights.h5")
        card = save(str(inner), variables, card)
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(inner, inner.name)
        files.card_path(inner).rename(files.card_path(path))
        inner.unlink()
        return card
    return save(str(path), variables, card)


# The first bytes tell that these are not weights, whatever their suffix is.


def _write_start(name: str, content: bytes, pattern: str) -> None:
    case(name, pattern)(_named(f"start_of_{name}", lambda x: x.write_bytes(content)))


def _named(name: str, function: Callable) -> Callable:
    function.__name__ = name
    return function


for suffix in files.SUFFIXES:
    _write_start(f"pointer{suffix}", LFS, r"pointer of Git LFS.*git lfs pull")
    _write_start(f"page{suffix}", HTML, r"is a web page")
    _write_start(f"empty{suffix}", b"", r"is empty")
_write_start("zeros.safetensors", bytes(4096), "begins with zeros")
_write_start("packed.npz", b"\x1f\x8b\x08\x00", "compressed.*gunzip")
_write_start("text.h5", b"hello", "not a file of weights")
_write_start("answer.pth", b'{"error": "not found"}', "text in JSON")
_write_start("annex.keras", b"/annex/objects/MD5E-s1--0.keras\n", "git-annex")
_write_start("dict.pth", pickle.dumps({"a": np.zeros(2)}), "refused: it is a pickle")
_write_start("old.npz", pickle.dumps([1], 2), "refused: it is a pickle")


_write_start("w.weights.json", b'{"weight_map": {}}', "Keras .* max_shard_size.*one")


@case("weights.pth.tar", "is a tar archive")
def tar_archive(path):
    with tarfile.open(path, "w") as archive:
        archive.add(__file__, "weights.pth")


@case("model.pt", "TorchScript")
def torch_script(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("m/data.pkl", "m/constants.pkl", "m/code/__torch__.py"):
            archive.writestr(name, b"\x80\x02N.")


@case("weights.bin", "zip archive of .*Unpack")
def zip_around_weights(path):
    inner = path.with_name("w.safetensors")
    valid(inner)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "folder/w.safetensors")


@case("one.npz", "single array")
def single_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


# HDF5.


def _open(path: pathlib.Path) -> h5py.File:
    valid(path)
    return h5py.File(path, "a")


KERNEL = "conv1_conv/conv1_conv/kernel"


def _replace(path: pathlib.Path, *args, **kwargs) -> None:
    with _open(path) as file:
        del file[KERNEL]
        file.create_dataset(KERNEL, *args, **kwargs)


def _secret(path: pathlib.Path) -> str:
    secret = path.with_name("secret")
    secret.write_bytes(bytes(7 * 7 * 3 * 4 * 4))
    return str(secret)


@case("w.h5", "refused: the values of .*other files")
def external_storage(path):
    storage = [(_secret(path), 0, h5py.h5f.UNLIMITED)]
    _replace(path, (7, 7, 3, 4), np.float32, external=storage)


@case("w.weights.h5", "refused: the values of .*other files")
def external_storage_of_keras_3(path):
    storage = [(_secret(path), 0, h5py.h5f.UNLIMITED)]
    with _open(path) as file:
        del file["layers/conv2d/vars/0"]
        place = file["layers/conv2d/vars"]
        place.create_dataset("0", (7, 7, 3, 4), np.float32, external=storage)


@case("w.h5", "refused: the values of .*other files")
def virtual_dataset(path):
    other = path.with_name("other.hdf5")
    with h5py.File(other, "w") as file:
        file["x"] = np.zeros((7, 7, 3, 4), np.float32)
    layout = h5py.VirtualLayout((7, 7, 3, 4), np.float32)
    layout[...] = h5py.VirtualSource(str(other), "x", (7, 7, 3, 4))
    with _open(path) as file:
        del file[KERNEL]
        file.create_virtual_dataset(KERNEL, layout)


def _link(path: pathlib.Path, name: str, link: object) -> None:
    with _open(path) as file:
        if name in file:
            del file[name]
        file[name] = link


@case("w.h5", "link to '/x', and a file of weights must")
def external_link_of_a_dataset(path):
    _link(path, KERNEL, h5py.ExternalLink("other.hdf5", "/x"))


@case("w.h5", "link to '/', and a file of weights must")
def external_link_of_a_layer(path):
    _link(path, "conv1_conv", h5py.ExternalLink("other.hdf5", "/"))


@case("w.h5", "'model_weights' in it is a link")
def external_link_of_the_model(path):
    _link(path, "model_weights", h5py.ExternalLink("other.hdf5", "/"))


@case("w.weights.h5", "is a link to '/layers/conv2d'")
def soft_link(path):
    _link(path, "layers/conv2d_1", h5py.SoftLink("/layers/conv2d"))


@case("w.h5", "is a link to '/loop'")
def soft_link_to_itself(path):
    _link(path, "loop", h5py.SoftLink("/loop"))


@case("w.h5", "does not fit keras_resnet50")
def hard_link_to_the_root(path):
    with _open(path) as file:
        del file[KERNEL]
        file["conv1_conv/loop"] = file["/"]


@case("w.h5", r"has the shape \(1000000000000, 1, 1, 1\)")
def fill_value_of_a_terabyte(path):
    _replace(path, (HUGE, 1, 1, 1), np.float32, fillvalue=1.0, chunks=(1024, 1, 1, 1))


@case("w.h5", "chunks of 2147483648 bytes")
def chunk_larger_than_its_dataset(path):
    chunks = (8, 8, 8, 2**20)
    _replace(path, (7, 7, 3, 4), np.float32, maxshape=(None,) * 4, chunks=chunks)


@case("w.h5", "a chunk of .* has more than 2352 bytes")
def chunk_that_unpacks_to_a_gigabyte(path):
    _replace(path, (7, 7, 3, 4), np.float32, chunks=(7, 7, 3, 4), compression="gzip")
    packer = zlib.compressobj(9)
    bomb = b"".join(packer.compress(bytes(2**24)) for _ in range(64)) + packer.flush()
    with h5py.File(path, "a") as file:
        file[KERNEL].id.write_direct_chunk((0, 0, 0, 0), bomb)


@case("w.h5", "another method than gzip")
def lzf(path):
    _replace(path, data=np.zeros((7, 7, 3, 4), np.float32), compression="lzf")


@case("w.h5", "are of the type object")
def references(path):
    _replace(path, (7, 7, 3, 4), h5py.ref_dtype)


@case("w.h5", "are of the type object")
def strings_of_any_length(path):
    _replace(path, (7, 7, 3, 4), h5py.string_dtype())


@case("w.h5", "are of the type")
def strings_of_one_length(path):
    _replace(path, (7, 7, 3, 4), "S100000000")


@case("w.h5", "are of the type")
def compound(path):
    _replace(path, (7, 7, 3, 4), [("a", "f4"), ("b", "f8")])


@case("w.h5", "are of the type complex64")
def complex_numbers_in_hdf5(path):
    _replace(path, (7, 7, 3, 4), np.complex64)


@case("w.h5", "'conv1_conv/kernel' is missing")
def empty_dataset(path):
    _replace(path, data=h5py.Empty("f4"))


@case("w.h5", "'conv1_conv/kernel' is missing")
def named_type_in_place_of_a_dataset(path):
    with _open(path) as file:
        del file[KERNEL]
        file[KERNEL] = np.dtype("f4")


@case("w.h5", "cannot be read")
def cut_off_hdf5(path):
    valid(path)
    path.write_bytes(path.read_bytes()[:-1000])


@case("w.weights.h5", "w.weights.h5")
def layer_with_an_array_for_a_name(path):
    with _open(path) as file:
        place = file["layers/conv2d/vars"].attrs
        place.create("name", np.zeros((2**10,), "S50"))
        del file["layers/conv2d/vars/0"]


# Archives of Keras.


def _repack(path: pathlib.Path, name: str = "model.weights.h5", **kwargs) -> None:
    valid(path)
    with zipfile.ZipFile(path) as archive:
        content = archive.read("model.weights.h5")
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        archive.writestr(name, content)


@case("w.keras", "claims 1073741824 bytes")
def keras_archive_that_unpacks_to_a_gigabyte(path):
    valid(path)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("model.weights.h5", "w") as file,
    ):
        for _ in range(64):
            file.write(bytes(2**24))


@case("w.keras", "is encrypted")
def encrypted_archive(path):
    valid(path)
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)


@case("w.keras", "the same name")
def archive_with_two_files_of_one_name(path):
    valid(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model.weights.h5", b"\x89HDF")


@case("w.keras", "another method than deflate")
def archive_of_lzma(path):
    _repack(path, compression=zipfile.ZIP_LZMA)


@case("w.keras", "is a zip archive of '../model.weights.h5'")
def archive_with_a_path_to_its_parent(path):
    _repack(path, "../model.weights.h5")


@case("w.keras", "cannot be read")
def archive_with_a_symbolic_link(path):
    valid(path)
    entry = zipfile.ZipInfo("model.weights.h5")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(entry, "/etc/passwd")


@case("w.keras", "cannot be read")
def archive_in_an_archive(path):
    valid(path)
    inner = path.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.weights.h5", inner)


@case("w.keras", "is a link to '/x'")
def archive_with_an_external_link(path):
    inner = path.with_name("w.h5")
    external_link_of_a_dataset(inner)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "model.weights.h5")
    files.card_path(inner).rename(files.card_path(path))


@case("w.keras", "w.keras")
def archive_that_claims_a_terabyte(path):
    valid(path)
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02")
    content[start + 20 : start + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    path.write_bytes(content)


@case("w.keras", "cut off or damaged")
def cut_off_archive(path):
    valid(path)
    path.write_bytes(path.read_bytes()[:-1000])


# NumPy.

WEIGHT = "conv1.0.weight.npy"


def _npy(header: str, content: bytes = b"", version: int = 1) -> bytes:
    length = struct.pack("<H" if version == 1 else "<I", len(header))
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + content


def _header(shape: object, dtype: object = "<f4") -> str:
    return f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n"


def _write_npz(
    path: pathlib.Path, content: bytes, name: str = WEIGHT, **kwargs
) -> None:
    """Writes an archive in which one array has another content."""
    valid(path)
    with np.load(path) as file:
        arrays = dict(file)
    del arrays[name.removesuffix(".npy")]
    np.savez(path, **arrays)
    with zipfile.ZipFile(path, "a", **kwargs) as archive:
        archive.writestr(name, content)


def _dtype(dtype: object) -> bytes:
    return _npy(_header((4, 3, 3, 3), dtype))


@case("w.npz", "is a pickle, which could run code")
def objects(path):
    _write_npz(path, _dtype("|O") + pickle.dumps(print))


@case("w.npz", r"has the shape \(1000000000000,\)")
def array_of_a_terabyte(path):
    _write_npz(path, _npy(_header((HUGE,))))


@case("w.npz", "cannot be read")
def array_without_its_values(path):
    _write_npz(path, _dtype("<f4"))


@case("w.npz", "cannot be read")
def header_of_megabytes(path):
    header = _header((3,)) + " " * 2**24
    _write_npz(path, _npy(header, version=2), compression=zipfile.ZIP_DEFLATED)


@case("w.npz", "cannot be read")
def header_that_claims_gigabytes(path):
    _write_npz(path, b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + _header((3,)).encode())


@case("w.npz", "nested too deeply")
def header_that_is_nested(path):
    _write_npz(path, _npy("-" * 9000 + "1"))


@case("w.npz", "cannot be read")
def header_with_code(path):
    _write_npz(path, _npy(_header((3,)).replace("False", "print(1)")))


@case("w.npz", r"has the shape \(-3,\)")
def negative_length(path):
    _write_npz(path, _npy(_header((-3,))))


@case("w.npz", r"has the shape \(0,\)")
def no_values(path):
    _write_npz(path, _npy(_header((0,))))


@case("w.npz", "are of the type str")
def strings(path):
    _write_npz(path, _dtype("<U100000000"))


@case("w.npz", "are of the type")
def structured(path):
    _write_npz(path, _dtype([("a", "<f4"), ("b", "<f8")]))


@case("w.npz", "are of the type complex")
def complex_numbers(path):
    _write_npz(path, _dtype("<c8"))


@case("w.npz", "are of the type datetime")
def dates(path):
    _write_npz(path, _dtype("<M8[s]"))


@case("w.npz", "are of the type bool")
def booleans(path):
    _write_npz(path, _dtype("|b1"))


@case("w.npz", "another method than deflate")
def npz_of_lzma(path):
    _write_npz(path, _npy(_header((3,))), compression=zipfile.ZIP_LZMA)


@case("w.npz", "the same name")
def two_arrays_of_one_name(path):
    valid(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(WEIGHT, _npy(_header((3,))))


@case("w.npz", "'conv1.0.weight' is missing")
def array_with_a_path_to_its_parent(path):
    _write_npz(path, _npy(_header((1,)), bytes(4)))
    content = path.read_bytes()
    path.write_bytes(content.replace(WEIGHT.encode(), b"../../evil1234.npy"))


@case("w.npz", "zip archive of")
def npz_with_another_file(path):
    valid(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("run.py", "print(1)")


@case("w.npz", "cannot be read")
def npz_with_a_wrong_checksum(path):
    valid(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x03\x04", 2000) - 100] ^= 1
    path.write_bytes(content)


# safetensors.


def _write_header(path: pathlib.Path, header: object, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _one(dtype: str, shape: list[int], size: int) -> dict:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


def _metadata(path: pathlib.Path, **metadata: str) -> None:
    valid(path)
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path, metadata)


@case("w.safetensors", "header claims 281474976710656 bytes, but the file has 13")
def header_of_a_quarter_petabyte(path):
    path.write_bytes(struct.pack("<Q", 2**48) + b'{"x":')


@case("w.safetensors", "header has 83886080 bytes")
def header_of_80_megabytes(path):
    _write_header(path, b"{" + b" " * (80 * 2**20 - 2) + b"}")


@case("w.safetensors", "cannot be read")
def overlapping_tensors(path):
    header = _one("F32", [2], 8) | {"y": _one("F32", [2], 8)["x"]}
    _write_header(path, header, bytes(8))


@case("w.safetensors", "cannot be read")
def tensor_beyond_the_end(path):
    _write_header(path, _one("F32", [HUGE], 4 * HUGE), bytes(8))


@case("w.safetensors", "cannot be read")
def tensor_of_another_size(path):
    _write_header(path, _one("F32", [HUGE], 8), bytes(8))


@case("w.safetensors", "cannot be read")
def length_that_overflows(path):
    _write_header(path, _one("F32", [2**62, 4], 0))


@case("w.safetensors", "cannot be read")
def header_that_is_not_json(path):
    _write_header(path, b"{not json at all")


@case("w.safetensors", "cannot be read")
def nested_header(path):
    _write_header(path, b'{"x":' + b"[" * 100_000 + b"}")


@case("w.safetensors", "does not fit test_resnet", model="test_resnet")
def tensors_of_length_zero(path):
    _write_header(path, _one("F32", [0, HUGE], 0))


for kind, size in {"F8_E4M3": 1, "C64": 8, "BOOL": 1}.items():

    def _write_kind(path, kind=kind, size=size):
        valid(path)
        tensors = safetensors.numpy.load_file(path)
        with safetensors.safe_open(path, "np") as file:
            metadata = file.metadata()
        header, start = {"__metadata__": metadata}, 0
        for name, value in tensors.items():
            end = start + value.size * size
            offsets = [start, end]
            shape = list(value.shape)
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": offsets}
            start = end
        _write_header(path, header, bytes(start))

    case("w.safetensors", "are of the type")(
        _named(f"numbers_of_type_{kind}", _write_kind)
    )


@case("w.safetensors", "has 30000 tensors")
def thirty_thousand_tensors(path):
    tensors = {f"{i}.conv1.weight": np.zeros((1, 1, 1, 1)) for i in range(30_000)}
    safetensors.numpy.save_file(tensors, path)


@case("w.safetensors", "names of up to 1000001 characters")
def name_of_a_million_characters(path):
    safetensors.numpy.save_file({"." * 10**6 + "x": np.zeros(1)}, path)


# Cards.


@case("w.safetensors", "header has .* bytes, but")
def card_of_20_megabytes(path):
    _metadata(path, card="{" + " " * 20 * 2**20 + "}")


@case("w.safetensors", "card of .* cannot be used")
def card_that_is_not_json(path):
    _metadata(path, card="hello")


@case("w.safetensors", "card of .* cannot be used")
def card_that_is_a_list(path):
    _metadata(path, card="[1, 2]")


@case("w.safetensors", "card of .* cannot be used")
def nested_card(path):
    _metadata(path, card="[" * 100_000)


def _write_spec(name: str, pattern: str, **fields: object) -> None:
    def write(path):
        card = json.loads(valid(path).to_json())
        card["spec"] |= fields
        _metadata(path, card=json.dumps(card))

    case("w.safetensors", pattern)(_named(f"card_with_{name}", write))


_write_spec("a_million_blocks", "2000000 blocks, but", stage_sizes=[10**6, 10**6])
_write_spec("widths_of_a_trillion", "w.safetensors", widths=[HUGE, HUGE])
_write_spec("negative_widths", "card of .* cannot be used", widths=[-4, -8])
_write_spec("negative_classes", "w.safetensors", num_classes=-1)
_write_spec("a_field_of_another_kind", "card of .* cannot be used", stage_sizes="many")
_write_spec("an_unknown_field", "card of .* no field", stages=[1])
_write_spec("no_blocks", "card of .* cannot be used", stage_sizes=[], widths=[])
_write_spec("a_stem_of_text", "card of .* cannot be used", stem=["7x7"])


@case("w.npz", "card.json has more than 16 MiB")
def card_file_of_17_megabytes(path):
    valid(path)
    files.card_path(path).write_bytes(b" " * 17 * 2**20)


@case("w.npz", "card.json is not text in UTF-8")
def card_file_of_bytes(path):
    valid(path)
    files.card_path(path).write_bytes(b"\xff\xfe\xff")


def _write_config(name: str, content: bytes, pattern: str) -> None:
    def write(path):
        _metadata(path)
        path.with_name("config.json").write_bytes(content)

    case("w.safetensors", pattern)(_named(f"config_of_{name}", write))


_write_config("a_page", HTML, "config.json is not valid JSON")
_write_config("deep_lists", b"[" * 100_000, "config.json is not valid JSON")
_write_config("a_list", b"[1]", "config.json has a list")
_write_config(
    "nothing", b'{"architecture": "resnet18"}', "json does not .*no 'input_size'"
)
_write_config("a_language_model", b'{"architecture": "gpt"}', "config.json does not")


# Lists of files.


def _write_index(name: str, content: object, pattern: str) -> None:
    def write(path):
        valid(path.with_name("shard.safetensors"))
        path.write_text(json.dumps(content))

    case("w.safetensors.index.json", pattern)(_named(f"index_{name}", write))


_write_index("to_a_parent", {"weight_map": {"x": "../shard.safetensors"}}, "refused")
_write_index("to_a_file", {"weight_map": {"x": "/etc/passwd"}}, "refused.*passwd")
_write_index("without_a_file", {"weight_map": {"x": "s2.safetensors"}}, "missing")
_write_index("without_a_map", {"metadata": {}}, "no weight_map")
_write_index("of_a_list", {"weight_map": ["x"]}, "no weight_map")
_write_index(
    "without_a_tensor", {"weight_map": {"x": "shard.safetensors"}}, "no tensor 'x'"
)
_write_index(
    "of_itself", {"weight_map": {"x": "w.safetensors.index.json"}}, "refused.*list"
)


# Weights directories.


def _directory(path: pathlib.Path, **arrays: np.ndarray) -> None:
    """Writes a weights directory in which some arrays are others."""
    card, variables = small_networks.card_and_variables("test_resnet")
    variables["params"] |= arrays
    save(f"{path}/", variables, card)


@case("own", r"has the shape \(8, 8388608\)")
def array_of_256_megabytes(path):
    kernel = np.broadcast_to(np.float32(0), (8, 2**23))
    _directory(path, head={"kernel": kernel, "bias": np.zeros(6, np.float32)})


@case("own", "no place for the tensor 'other'")
def another_array_of_256_megabytes(path):
    _directory(path, other=np.broadcast_to(np.float32(0), (2**26,)))


@case("own", "card.json has more than 16 MiB")
def directory_with_a_card_of_17_megabytes(path):
    _directory(path)
    (path / "card.json").write_bytes(b" " * 17 * 2**20)


@case("own", "card of .* cannot be used")
def directory_with_a_nested_card(path):
    _directory(path)
    (path / "card.json").write_text("[" * 100_000)


@case("own", "2000000 blocks, but")
def directory_with_a_million_blocks(path):
    _directory(path)
    card = json.loads((path / "card.json").read_text())
    card["spec"] |= {"stage_sizes": [10**6, 10**6]}
    (path / "card.json").write_text(json.dumps(card))


@case("own", "own is damaged")
def directory_without_arrays(path):
    _directory(path)
    shutil.rmtree(path / "variables")


@case("own", "own is damaged")
def directory_with_metadata_of_a_page(path):
    _directory(path)
    (path / "variables" / "_METADATA").write_bytes(HTML)


@case("own", "own is damaged")
def directory_with_arrays_of_zeros(path):
    _directory(path)
    for file in (path / "variables").glob("**/d/*"):
        file.write_bytes(bytes(file.stat().st_size))


def write_all(cases: Mapping[str, Case], directory: pathlib.Path) -> None:
    """Writes all files, each into a directory with the name of its case."""
    for name, hostile in cases.items():
        folder = directory / name
        folder.mkdir()
        hostile.write(folder / hostile.name)


def problems(
    cases: Mapping[str, Case], module: str, directory: pathlib.Path
) -> list[tuple]:
    """Returns the cases that are not refused as they should be.

    Args:
      cases: The cases, which are written.
      module: The module whose `main` loads the files.
      directory: The directory of the files.
    """
    write_all(cases, directory)
    process = subprocess.run(
        [sys.executable, "-m", module, str(directory)],
        check=True,
        capture_output=True,
        text=True,
    )
    results = [json.loads(line) for line in process.stdout.splitlines()]
    assert [name for name, *_ in results] == list(cases)
    return [
        (name, kind, message, growth)
        for name, kind, message, growth in results
        if kind != "UserError"
        or not re.search(cases[name].pattern, message)
        or f"/{name}/" not in message
        or "\n" in message
        or message[-1] not in ".?"
        or growth > GROWTH
    ]


def load_all(cases: Mapping[str, Case], kinds: Iterable[str], directory: str) -> None:
    """Loads all files with limited memory, and prints a line about each.

    Args:
      cases: The cases.
      kinds: The suffixes of files that are read once before, so that the memory of all
        modules is not counted.
      directory: The directory of the files.
    """
    root = pathlib.Path(directory)
    for kind in kinds:
        path = root / f"valid{kind}"
        valid(path)
        load(str(path))
    size = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = size * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name, hostile in cases.items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kind, message = "none", ""
        try:
            load(str(root / name / hostile.name), model=hostile.model)
        except UserError as error:
            kind, message = "UserError", str(error)
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        print(json.dumps([name, kind, message, growth]), flush=True)


if __name__ == "__main__":
    load_all(CASES, ("", ".safetensors", ".npz", ".h5", ".keras"), sys.argv[1])
