"""Writes hostile files of torch; `hostile_weights.py` says how they are measured."""

import collections
import functools
import pathlib
import pickle
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from tests.helpers import hostile_weights
from tests.helpers.hostile_weights import HUGE, Case, load_all, valid

CASES: dict[str, Case] = {}
case = functools.partial(hostile_weights.case, cases=CASES)

NAME = "conv1.0.weight"


def _write(path: pathlib.Path, change: Callable[[dict], Any], **kwargs) -> None:
    """Writes a valid file with another content, which depends on the valid one."""
    valid(path)
    state = torch.load(path, weights_only=True)
    torch.save(change(state), path, **kwargs)


def _replace(path: pathlib.Path, value: Any, **kwargs) -> None:
    _write(path, lambda state: state | {NAME: value}, **kwargs)


class Call:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Callable, *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def _set_archive(path: pathlib.Path, change: Callable[[str, bytes], bytes], **kwargs):
    """Changes the entries of an archive."""
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", **kwargs) as archive:
        for name, entry in content.items():
            archive.writestr(name, change(name, entry))


@case("w.pth", r"has the shape \(1000000000000,\)")
def one_value_that_is_repeated(path):
    _replace(path, torch.zeros(1).expand(HUGE))


@case("w.pth", r"has the shape \(1000000000000,\)")
def one_value_that_is_repeated_in_an_old_file(path):
    _replace(path, torch.zeros(1).expand(HUGE), _use_new_zipfile_serialization=False)


@case("w.pth", "not a complete file of torch.save")
def storage_that_is_cut_off(path):
    valid(path)
    _set_archive(path, lambda name, x: x[:4] if "/data/" in name else x)


@case("w.pth", "bytes are in another order")
def storage_of_a_gigabyte_with_swapped_bytes(path):
    _replace(path, torch.empty(2**28))
    _set_archive(path, lambda name, x: b"big" if "byteorder" in name else x[: 10**6])


@case("w.pth", "w.pth")
def storage_of_a_gigabyte_without_values(path):
    _replace(path, torch.empty(2**28))
    _set_archive(path, lambda name, x: x[:4] if len(x) > 2**29 else x)


@case("w.pth", "w.pth")
def storage_of_a_gigabyte_without_values_in_an_old_file(path):
    _replace(path, torch.zeros(2**28), _use_new_zipfile_serialization=False)
    with path.open("r+b") as file:
        file.truncate(10_000)


@case("w.pth", "compressed, and torch.save compresses nothing")
def compressed_archive(path):
    _replace(path, torch.zeros(2**26))
    _set_archive(path, lambda name, x: x, compression=zipfile.ZIP_DEFLATED)


for _kind, _value in {
    "sparse_coo": torch.zeros(4, 3, 3, 3).to_sparse(),
    "meta": torch.zeros(4, 3, 3, 3, device="meta"),
    "complex64": torch.zeros(4, 3, 3, 3, dtype=torch.complex64),
    "bool": torch.zeros(4, 3, 3, 3, dtype=torch.bool),
    "float8_e4m3fn": torch.zeros(4, 3, 3, 3).to(torch.float8_e4m3fn),
    "quint8": torch.quantize_per_tensor(torch.zeros(4, 3, 3, 3), 1, 0, torch.quint8),
}.items():

    def _write_kind(path, value=_value):
        _replace(path, value)

    _write_kind.__name__ = f"tensor_of_type_{_kind}"
    case("w.pth", f"are of the type {_kind}")(_write_kind)


@case("w.pth", "pickle calls bytearray")
def bytes_of_two_gigabytes(path):
    _write(path, lambda state: state | {"x": Call(bytearray, Call(bytearray, 2**31))})


@case("w.pth", "pickle calls bytearray")
def bytes_of_two_gigabytes_in_an_old_file(path):
    _write(
        path,
        lambda state: {"x": Call(bytearray, 2**31)},
        _use_new_zipfile_serialization=False,
    )


@case("w.pth", "pickle calls _rebuild_device_tensor")
def repeated_value_that_is_converted(path):
    rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
    value = torch.zeros(1).expand(2**30)
    _replace(path, Call(rebuild, value, torch.float64, "cpu", False))


@case("w.pth", "refused: besides tensors .* could run code")
def code(path):
    _replace(path, Call(print, "was run"))


@case("w.pth", "refused: besides tensors .* could run code")
def code_in_an_old_file(path):
    _replace(path, Call(print, "was run"), _use_new_zipfile_serialization=False)


@case("w.pth", "refused: it is a pickle")
def plain_pickle(path):
    path.write_bytes(pickle.dumps({NAME: Call(print, "was run")}, 2))


@case("w.pth", "w.pth")
def list_of_tensors(path):
    _write(path, lambda state: list(state.values()))


@case("w.pth", "w.pth")
def one_tensor(path):
    _write(path, lambda state: state[NAME])


@case("w.pth", "w.pth")
def names_that_are_numbers(path):
    _write(path, lambda state: dict(enumerate(state.values())))


@case("w.pth", "w.pth")
def state_in_itself(path):
    content: dict = {}
    content |= {"state_dict": content, "model": content}
    _write(path, lambda state: content)


@case("w.pth", "w.pth")
def list_in_itself(path):
    content: list = []
    content.append(content)
    _write(path, lambda state: {"state_dict": content})


@case("w.pth", "w.pth")
def nested_states(path):
    content: dict = {}
    for _ in range(100):
        content = {"state_dict": content}
    _write(path, lambda state: content)


@case("w.pth", "w.pth")
def state_that_doubles_at_each_level(path):
    content: dict = {"x": torch.zeros(1)}
    for _ in range(60):
        content = {"a": content, "b": content}
    _write(path, lambda state: content)


@case("w.pth", "w.pth")
def nothing(path):
    _write(path, lambda state: collections.OrderedDict())


@case("w.pth", "TorchScript")
def torch_script(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


@case("w.pth", "the same name")
def two_pickles(path):
    valid(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], b"\x80\x02N.")


@case("w.pth", "cannot be read")
def cut_off_pickle(path):
    valid(path)
    _set_archive(path, lambda name, x: x[:100] if "data.pkl" in name else x)


if __name__ == "__main__":
    load_all(CASES, (".pth",), sys.argv[1])
