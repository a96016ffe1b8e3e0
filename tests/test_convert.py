"""Converting weights between formats changes neither them nor their card."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from resnet_jax.convert import main
from resnet_jax.errors import UserError
from resnet_jax.weights import files
from resnet_jax.weights.load import load
from resnet_jax.weights.save import save
from tests.helpers import small_networks

# They take too long for the two-minute part.
pytestmark = pytest.mark.slow


FORMATS = ["w.safetensors", "w.npz", "directory"]
KERAS_FORMATS = ["w.weights.h5", "w.h5"]
KERAS = [name for name in small_networks.NAMES if "keras" in name]


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *((name, format) for name in small_networks.NAMES for format in FORMATS),
        *((name, format) for name in KERAS for format in KERAS_FORMATS),
    ],
)
def test_weights_come_back_bit_for_bit_with_their_card(tmp_path, name, format):
    card, variables = small_networks.card_and_variables(name)
    written = save(str(tmp_path / format), variables, card)
    read, loaded = load(str(tmp_path / format))
    small_networks.assert_equal(loaded, variables)
    assert read == written == dataclasses.replace(card, scheme=written.scheme)


@pytest.mark.parametrize("name", small_networks.NAMES)
def test_a_file_is_the_same_after_a_round_trip_through_our_format(tmp_path, name):
    first, between, last = (tmp_path / x for x in ("a.safetensors", "own", "b.npz"))
    card, variables = small_networks.card_and_variables(name)
    scheme = save(str(first), variables, card).scheme
    main(["convert", str(first), str(between)])
    main(["convert", str(between), str(last), f"--to={scheme}"])
    before, after = files.read(first), files.read(last)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.shape == after[key].shape
        assert np.asarray(value).tobytes() == np.asarray(after[key]).tobytes(), key


def test_bit_weights_are_written_to_npz_with_their_authors_names(tmp_path):
    card, variables = small_networks.card_and_variables("resnetv2_50x1_bit")
    save(str(tmp_path / "w.npz"), variables, card)
    with np.load(tmp_path / "w.npz") as file:
        assert "resnet/root_block/standardized_conv2d/kernel" in file.files


def test_a_file_for_timm_has_timms_names(tmp_path, capsys):
    card, variables = small_networks.card_and_variables("seresnet18")
    save(str(tmp_path / "own"), variables, card)
    main(["convert", str(tmp_path / "own"), str(tmp_path / "w.safetensors")])
    assert "seresnet18" in capsys.readouterr().out
    assert "layer1.0.se.fc1.weight" in load_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_upcast(tmp_path, dtype):
    card, variables = small_networks.card_and_variables("test_resnet")
    path = tmp_path / "w.safetensors"
    save(str(path), variables, card)
    half = {name: value.astype(dtype) for name, value in load_file(path).items()}
    save_file(half, path, {"card": card.to_json()})
    main(["convert", str(path), str(tmp_path / "full.safetensors")])
    for name, value in load_file(tmp_path / "full.safetensors").items():
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, half[name].astype(np.float32))


@pytest.mark.parametrize(
    ("name", "target", "to", "message"),
    [
        ("test_resnet", "w.h5", None, "Keras has no network.*Write .safetensors"),
        ("test_resnet", "w.onnx", None, r"ends in one of \.safetensors, \.pth"),
        ("test_resnet", "w.npz", "bit", "'bit'.*Known: timm, resnet_jax"),
        ("test_resnet", "nowhere/w.npz", None, "no directory .*nowhere"),
        (
            "test_resnet",
            "own",
            "timm",
            "is a directory, whose naming scheme is",
        ),
        ("test_resnet", "taken", None, "exists and is not a weights directory"),
    ],
)
def test_the_message_for_a_format_that_cannot_be_written_has_the_remedy(
    tmp_path, name, target, to, message
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("dear diary")
    card, variables = small_networks.card_and_variables(name)
    with pytest.raises(UserError, match=message):
        save(str(tmp_path / target), variables, card, to)
    # No file is left, and none is lost.
    assert [path.name for path in tmp_path.rglob("*")] == ["taken", "diary.txt"]


def test_a_file_that_cannot_be_replaced_is_kept(tmp_path, monkeypatch):
    card, variables = small_networks.card_and_variables("test_resnet")
    path = tmp_path / "w.npz"
    path.write_text("old")

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"w\.npz cannot be written: .*No space left"):
        save(str(path), variables, card)
    assert [file.name for file in tmp_path.iterdir()] == ["w.npz"]
    assert path.read_text() == "old"


def test_a_weights_directory_can_be_replaced(tmp_path):
    path = str(tmp_path / "own")
    save(path, *reversed(small_networks.card_and_variables("seresnet18")))
    card, variables = small_networks.card_and_variables("test_resnet")
    save(path, variables, card)
    small_networks.assert_equal(load(path)[1], variables)
