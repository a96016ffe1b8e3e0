"""The format of a file of weights is told by its content."""

import json
import sys
import types
import zipfile

import h5py
import numpy as np
import pytest
import safetensors.numpy

from resnet_jax.errors import UserError
from resnet_jax.weights import files, formats
from resnet_jax.weights.load import load
from resnet_jax.weights.save import save
from tests.helpers import small_networks


@pytest.mark.parametrize(
    ("network", "suffix", "name"),
    [
        ("test_resnet", ".safetensors", "W.SafeTensors"),
        ("test_resnet", ".safetensors", "weights.pth"),
        ("test_resnet", ".safetensors", "blob"),
        ("test_resnet", ".npz", "W.NPZ"),
        ("test_resnet", ".npz", "weights.ckpt"),
        ("keras_resnet50", ".weights.h5", "W.H5"),
        ("keras_resnet50", ".h5", "weights.bin"),
    ],
)
def test_a_file_is_read_whatever_its_suffix(tmp_path, network, suffix, name):
    card, variables = small_networks.card_and_variables(network)
    original, path = tmp_path / f"w{suffix}", tmp_path / name
    save(str(original), variables, card)
    original.rename(path)
    if files.card_path(original).exists():
        files.card_path(original).rename(files.card_path(path))
    small_networks.assert_equal(load(str(path))[1], variables)


@pytest.mark.parametrize("name", ["OUT.SAFETENSORS", "Out.Npz"])
def test_files_are_written_with_suffixes_in_upper_case(tmp_path, name):
    card, variables = small_networks.card_and_variables("test_resnet")
    save(str(tmp_path / name), variables, card)
    small_networks.assert_equal(load(str(tmp_path / name))[1], variables)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_the_weights_in_a_keras_archive_are_read(tmp_path, method):
    card, variables = small_networks.card_and_variables("keras_resnet50")
    inner, path = tmp_path / "model.weights.h5", tmp_path / "w.keras"
    save(str(inner), variables, card)
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("config.json", "{}")
        archive.write(inner, inner.name)
    files.card_path(inner).rename(files.card_path(path))
    small_networks.assert_equal(load(str(path))[1], variables)


def test_compressed_datasets_of_hdf5_are_read(tmp_path):
    card, variables = small_networks.card_and_variables("keras_resnet50")
    path = tmp_path / "w.h5"
    save(str(path), variables, card)
    with h5py.File(path, "a") as file:
        for layer in ("conv1_conv", "conv2_block1_1_conv"):
            name = f"{layer}/{layer}/kernel"
            value = file[name][()]
            del file[name]
            file.create_dataset(name, data=value, compression="gzip", shuffle=True)
    small_networks.assert_equal(load(str(path))[1], variables)


def write_shards(directory) -> dict:
    """Writes two files of tensors and the list of them; returns the variables."""
    card, variables = small_networks.card_and_variables("test_resnet")
    save(str(directory / "w.safetensors"), variables, card)
    tensors = safetensors.numpy.load_file(directory / "w.safetensors")
    names = sorted(tensors)
    places = {}
    for i, part in enumerate((names[:10], names[10:]), 1):
        shard = f"model-0000{i}-of-00002.safetensors"
        content = {name: tensors[name] for name in part}
        safetensors.numpy.save_file(content, directory / shard)
        places |= dict.fromkeys(part, shard)
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    files.card_path(index).write_text(card.to_json())
    (directory / "w.safetensors").unlink()
    return variables


def test_tensors_are_read_from_several_files(tmp_path):
    variables = write_shards(tmp_path)
    # The directory of the list serves as well.
    for source in (tmp_path, tmp_path / "model.safetensors.index.json"):
        small_networks.assert_equal(load(str(source))[1], variables)


def test_a_missing_file_of_several_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is miss"):
        load(str(tmp_path))


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu124", "2.0.0a0+git1"])
def test_versions_of_torch_that_run_code_are_refused(tmp_path, monkeypatch, version):
    torch = types.ModuleType("torch")
    torch.__version__ = version
    monkeypatch.setitem(sys.modules, "torch", torch)
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", b"")
    with pytest.raises(UserError, match=r"CVE-2025-32434.*'torch>=2\.6'.*\.safetens"):
        load(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("kind", ["external storage", "virtual dataset", "link"])
def test_hdf5_does_not_reach_other_files(tmp_path, kind):
    card, variables = small_networks.card_and_variables("keras_resnet50")
    path, secret = tmp_path / "w.h5", tmp_path / "secret.h5"
    save(str(path), variables, card)
    name = "conv1_conv/conv1_conv/kernel"
    with h5py.File(secret, "w") as file:
        file["x"] = np.full((7, 7, 3, 4), 42, np.float32)
        start = file["x"].id.get_offset()
    with h5py.File(path, "a") as file:
        del file[name]
        if kind == "external storage":
            place = [(str(secret), start, h5py.h5f.UNLIMITED)]
            file.create_dataset(name, (7, 7, 3, 4), np.float32, external=place)
        elif kind == "virtual dataset":
            layout = h5py.VirtualLayout((7, 7, 3, 4), np.float32)
            layout[...] = h5py.VirtualSource(str(secret), "x", (7, 7, 3, 4))
            file.create_virtual_dataset(name, layout)
        else:
            file[name] = h5py.ExternalLink(str(secret), "/x")
    with pytest.raises(UserError, match=r"w\.h5 is refused: .*must contain its tenso"):
        load(str(path))


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS.*git lfs pull"),
        (b"\xef\xbb\xbf\n <!DOCTYPE HTML>", "is a web page"),
        (b"<html>", "is a web page"),
        (b"", "is empty"),
        (b"BZh91AY", "compressed.*bunzip2"),
    ],
)
def test_what_is_in_place_of_weights_is_told(tmp_path, content, pattern):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=pattern):
        formats.format_of(path)
