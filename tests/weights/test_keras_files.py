"""Keras's weight files, read and written without Keras.

tests/oracles/test_keras.py tests that Keras reads them.
"""

import dataclasses
import zipfile

import h5py
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import ZOO, ResNetSpec
from resnet_jax.weights import SCHEMES, keras_files
from resnet_jax.weights.naming import Scheme, from_foreign, to_foreign
from resnet_jax.weights.schemes.keras import list_layers
from tests.helpers import keyed

NAMES = ["keras_resnet50", "keras_resnet50v2", "tutorial_keras_resnet50"]
KINDS = ["small.weights.h5", "small.h5"]


def small(name: str) -> tuple[ResNetSpec, Scheme]:
    """Returns a small network with all kinds of layers, and its naming scheme."""
    spec = dataclasses.replace(
        ZOO[name].spec,
        stage_sizes=(1, 2),
        widths=(2, 4),
        stem=((7, 2, 2),),
        num_classes=3,
        head_pool=None,
    )
    return spec, SCHEMES[ZOO[name].scheme]


def tensors_of(spec: ResNetSpec, scheme: Scheme) -> dict[str, np.ndarray]:
    """Returns keyed values under Keras's names."""
    return to_foreign(keyed.variables(spec), spec, scheme)


def assert_equal(got, expected) -> None:
    """Compares names, types and values bit for bit."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        read = np.asarray(got[name])
        np.testing.assert_array_equal(read, value, err_msg=name)
        assert read.dtype == value.dtype


@pytest.fixture
def written(tmp_path):
    """Returns a directory with a file of each kind, and the tensors in each."""
    spec, scheme = small("keras_resnet50")
    tensors = tensors_of(spec, scheme)
    for kind in KINDS:
        keras_files.write(tmp_path / kind, tensors, spec, scheme)
    with zipfile.ZipFile(tmp_path / "small.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.write(tmp_path / "small.weights.h5", "model.weights.h5")
    return tmp_path, tensors


@pytest.mark.parametrize(
    ("name", "native", "foreign"),
    [
        ("keras_resnet50", "stem_conv1/bias", "conv1_conv/bias"),
        ("keras_resnet50", "stem_norm1/bias", "conv1_bn/beta"),
        ("keras_resnet50", "stage1_block2/conv1/kernel", "conv2_block2_1_conv/kernel"),
        ("keras_resnet50", "stage4_block1/norm3/scale", "conv5_block1_3_bn/gamma"),
        (
            "keras_resnet152",
            "stage3_block36/norm2/mean",
            "conv4_block36_2_bn/moving_mean",
        ),
        (
            "keras_resnet50",
            "stage2_block1/shortcut/norm/var",
            "conv3_block1_0_bn/moving_variance",
        ),
        ("keras_resnet50", "head/kernel", "predictions/kernel"),
        ("keras_resnet50v2", "stem_conv1/kernel", "conv1_conv/kernel"),
        (
            "keras_resnet50v2",
            "stage1_block1/norm1/bias",
            "conv2_block1_preact_bn/beta",
        ),
        ("keras_resnet50v2", "stage1_block1/norm3/bias", "conv2_block1_2_bn/beta"),
        ("keras_resnet50v2", "stage4_block1/conv3/bias", "conv5_block1_3_conv/bias"),
        ("keras_resnet50v2", "final_norm/bias", "post_bn/beta"),
        ("tutorial_keras_resnet50", "stem_norm1/scale", "bn_conv1/gamma"),
        (
            "tutorial_keras_resnet50",
            "stage1_block1/conv1/bias",
            "res2a_branch2a/bias",
        ),
        (
            "tutorial_keras_resnet50",
            "stage3_block6/norm2/bias",
            "bn4f_branch2b/beta",
        ),
        (
            "tutorial_keras_resnet50",
            "stage4_block1/shortcut/conv/kernel",
            "res5a_branch1/kernel",
        ),
        ("tutorial_keras_resnet50", "head/bias", "fc6/bias"),
    ],
)
def test_native_names_have_the_names_of_keras(name, native, foreign):
    assert SCHEMES[ZOO[name].scheme].names(ZOO[name].spec)[native] == foreign


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_written_tensors_are_read_bit_for_bit(name, kind, tmp_path):
    spec, scheme = small(name)
    tensors = tensors_of(spec, scheme)
    keras_files.write(tmp_path / kind, tensors, spec, scheme)
    assert_equal(keras_files.read(tmp_path / kind), tensors)
    again = keras_files.read(tmp_path / kind, spec, scheme)
    assert_equal(to_foreign(from_foreign(again, spec, scheme), spec, scheme), tensors)
    assert [path.name for path in tmp_path.iterdir()] == [kind]


def test_a_keras_archive_can_be_read(written):
    directory, tensors = written
    assert_equal(keras_files.read(directory / "small.keras"), tensors)


def test_the_content_of_a_file_decides_its_kind(written):
    directory, tensors = written
    (directory / "small.h5").rename(directory / "old.weights.h5")
    assert_equal(keras_files.read(directory / "old.weights.h5"), tensors)


def test_layers_without_names_are_named_by_their_order(written):
    directory, tensors = written
    path = directory / "small.weights.h5"
    with h5py.File(path, "a") as file:
        # Keras wrote no names before 3.6.
        for layer in file["layers"].values():
            del layer["vars"].attrs["name"]
    read = keras_files.read(path)
    np.testing.assert_array_equal(
        # In a block with a projection this is the fourth convolution.
        read["conv2d_4/kernel"],
        tensors["conv2_block1_3_conv/kernel"],
    )
    spec, scheme = small("keras_resnet50")
    assert_equal(keras_files.read(path, spec, scheme), tensors)

    deeper = dataclasses.replace(spec, stage_sizes=(2, 2))
    with pytest.raises(UserError, match=r"small.weights.h5 has 12 unnamed layers"):
        keras_files.read(path, deeper, scheme)


def test_numbers_of_unnamed_layers_may_start_anywhere(tmp_path):
    # A notebook that builds its network twice makes such files.
    spec, scheme = small("tutorial_keras_resnet50")
    tensors = tensors_of(spec, scheme)
    first = {"conv2d": 53, "batch_normalization": 8, "dense": 0}
    with h5py.File(tmp_path / "model.h5", "w") as file:
        root = file.create_group("model_weights")
        root.attrs["layer_names"] = np.array([b"unused"])
        for kind, number in first.items():
            layers = [x for x in list_layers(spec, scheme) if x.kind == kind]
            for n, layer in enumerate(layers, number):
                name = f"{kind}_{n}" if n else kind
                for variable in layer.variables:
                    value = tensors[f"{layer.name}/{variable}"]
                    root[f"{name}/{name}/{variable}:0"] = value
    assert_equal(keras_files.read(tmp_path / "model.h5", spec, scheme), tensors)


def test_names_of_legacy_files_are_converted(tmp_path):
    values = [np.full(3, i, np.float32) for i in range(5)]
    with h5py.File(tmp_path / "old.h5", "w") as file:
        # Keras splits a list that is too long for one attribute.
        file.attrs["layer_names0"] = np.array([b"conv1_bn"])
        file["conv1_bn/conv1_bn_1/gamma:0"] = values[0]
        file["conv1_bn/conv1_bn_1/beta:0"] = values[1]
        file["probs/probs/bias:0"] = values[2]
        # This network is a layer of another network.
        file["resnet50/post_bn/beta:0"] = values[3]
        file["resnet50/conv1_conv/bias:0"] = values[4]
    expected = [
        "conv1_bn/gamma",
        "conv1_bn/beta",
        "predictions/bias",
        "post_bn/beta",
        "conv1_conv/bias",
    ]
    read = keras_files.read(tmp_path / "old.h5")
    assert_equal(read, dict(zip(expected, values, strict=True)))


def test_bfloat16_can_be_read(tmp_path):
    value = np.arange(6).astype(jnp.bfloat16)
    with h5py.File(tmp_path / "half.weights.h5", "w") as file:
        group = file.create_group("layers/dense/vars")
        group.attrs["name"] = "predictions"
        group.create_dataset("0", data=value).attrs["dtype"] = "bfloat16"
    read = keras_files.read(tmp_path / "half.weights.h5")
    assert_equal(read, {"predictions/kernel": value})


@pytest.mark.parametrize("kind", [*KINDS, "small.keras"])
def test_a_truncated_file_is_named(kind, written):
    directory, _ = written
    path = directory / kind
    content = path.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(
            UserError, match=rf"{kind} (is empty|is cut off|cannot be read)"
        ):
            keras_files.read(path)


def test_files_of_other_programs_are_named(tmp_path):
    with pytest.raises(UserError, match=r"There is no file .*none\.h5;"):
        keras_files.read(tmp_path / "none.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["data"] = np.zeros(3)
    with pytest.raises(UserError, match=r"other\.h5 is not a Keras weight file"):
        keras_files.read(tmp_path / "other.h5")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match=r"other\.npz is not a Keras weight file"):
        keras_files.read(tmp_path / "other.npz")
    with zipfile.ZipFile(tmp_path / "other.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(UserError, match=r"other\.keras is a zip archive of 'config"):
        keras_files.read(tmp_path / "other.keras")


@pytest.mark.parametrize("suffix", [".keras", ".npz", ""])
def test_the_error_for_a_wrong_suffix_names_the_right_one(suffix, tmp_path):
    spec, scheme = small("keras_resnet50")
    message = rf"cannot be written as '{suffix}'.*\.weights\.h5"
    with pytest.raises(UserError, match=message):
        keras_files.write(
            tmp_path / f"out{suffix}", tensors_of(spec, scheme), spec, scheme
        )


def test_a_missing_tensor_is_named_and_nothing_is_written(tmp_path):
    spec, scheme = small("keras_resnet50")
    tensors = tensors_of(spec, scheme)
    del tensors["conv1_bn/moving_mean"]
    with pytest.raises(UserError, match=r"'conv1_bn/moving_mean' is missing"):
        keras_files.write(tmp_path / "out.weights.h5", tensors, spec, scheme)
    assert not list(tmp_path.iterdir())
