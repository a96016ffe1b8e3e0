"""Files of weights are recognised, adapted to another head or input, or rejected."""

import dataclasses
import sys
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from resnet_jax.errors import UserError
from resnet_jax.models import ZOO, build, get_spec
from resnet_jax.weights import SCHEMES, files
from resnet_jax.weights.adapt import adapt_channels
from resnet_jax.weights.load import load
from resnet_jax.weights.naming import to_foreign
from resnet_jax.weights.save import save
from tests.helpers import keyed, small_networks


def tensors_of(name: str, **fields) -> dict[str, np.ndarray]:
    """Returns keyed variables of a network under the names of its scheme."""
    spec = get_spec(name, **fields)
    return to_foreign(keyed.variables(spec), spec, SCHEMES[ZOO[name].scheme])


def write_without_card(path, tensors) -> str:
    """Writes a safetensors file as other programs do; returns its path."""
    save_file({name: np.array(x, order="C") for name, x in tensors.items()}, path)
    return str(path)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("test_resnet", {}),
        ("akamaster_resnet20", {}),
        ("highway32", {}),
        ("wrn40_1", {}),
        # This network was trained on other data.
        ("test_resnet", {"num_classes": 7, "in_channels": 5}),
    ],
)
def test_a_file_without_a_card_is_recognised(tmp_path, name, fields):
    path = write_without_card(tmp_path / "w.safetensors", tensors_of(name, **fields))
    card, variables = load(path)
    assert card.network == name
    assert card.make_spec() == get_spec(name, **fields)
    small_networks.assert_equal(variables, keyed.variables(get_spec(name, **fields)))


def test_the_first_of_several_fitting_networks_is_taken_and_all_are_named(
    tmp_path, caplog
):
    path = write_without_card(tmp_path / "w.safetensors", tensors_of("plain20"))
    assert load(path)[0].network == "cifar_resnet20"
    assert "all of cifar_resnet20, plain20, and is loaded as cifar_" in caplog.text
    assert load(path, model="plain20")[0].network == "plain20"


def test_the_error_for_a_file_that_fits_no_network_names_the_flag(tmp_path):
    path = write_without_card(tmp_path / "w.safetensors", {"some.weight": np.zeros(3)})
    with pytest.raises(UserError, match=r"fits no network.*'some\.weight'.*--model"):
        load(path)


def spoil(tensors: dict, defect: str) -> dict:
    """Gives tensors one defect."""
    name = "layer2.0.conv1.weight"
    if defect == "missing":
        del tensors[name]
    elif defect == "surplus":
        tensors["layer2.0.conv9.weight"] = tensors[name]
    elif defect == "shape":
        tensors[name] = tensors[name][:, :3]
    else:
        tensors[name] = np.full_like(tensors[name], np.nan)
    return tensors


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("missing", r"'layer2\.0\.conv1\.weight' is missing"),
        ("surplus", r"no place for the tensor 'layer2\.0\.conv9\.weight'"),
        ("shape", r"'layer2\.0\.conv1\.weight' has the shape .*needs"),
        ("nan", r"'layer2\.0\.conv1\.weight' has values that are not finite"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_with_file_and_network(
    tmp_path, defect, message
):
    tensors = spoil(tensors_of("test_resnet"), defect)
    path = write_without_card(tmp_path / "w.safetensors", tensors)
    with pytest.raises(
        UserError, match=rf"w\.safetensors does not fit test_.*{message}"
    ):
        load(path, model="test_resnet")


def test_v1_weights_are_rejected_by_the_v1_5_network(tmp_path):
    card, variables = small_networks.card_and_variables("resnet50_v1")
    path = str(tmp_path / "w.safetensors")
    save(path, variables, card)
    fields = {key: card.spec[key] for key in ("stage_sizes", "widths", "stem", "block")}
    with pytest.raises(UserError, match=r"stride_at='1x1'.*resnet50 has .*'3x3'"):
        load(path, model="resnet50", **fields)
    load(path, model="resnet50_v1", **fields)


def test_fields_that_do_not_change_the_function_may_differ(tmp_path):
    card, variables = small_networks.card_and_variables("resnet50")
    path = str(tmp_path / "w.safetensors")
    save(path, variables, card)
    spec = load(path, drop_path=0.2, zero_init_last=False, dropout=0.1)[0].make_spec()
    assert (spec.drop_path, spec.zero_init_last, spec.dropout) == (0.2, False, 0.1)


def test_weights_of_another_kind_of_network_are_rejected(tmp_path):
    card, variables = small_networks.card_and_variables("vgg19_bn")
    save(str(tmp_path / "w.npz"), variables, card)
    with pytest.raises(UserError, match="weights of vgg19_bn, not of resnet50"):
        load(str(tmp_path / "w.npz"), model="resnet50")


def test_first_kernels_are_summed_to_one_channel_and_repeated_to_more():
    kernel = keyed.generator("kernel").standard_normal((7, 7, 3, 2), np.float32)
    r, g, b = np.moveaxis(kernel, 2, 0)
    np.testing.assert_allclose(adapt_channels(kernel, 1)[:, :, 0], r + g + b, rtol=1e-6)
    scaled = np.stack([r, g, b, r, g], axis=2) * np.float32(3 / 5)
    np.testing.assert_array_equal(adapt_channels(kernel, 5), scaled)
    two = np.stack([r, g], axis=2) * np.float32(3 / 2)
    np.testing.assert_array_equal(adapt_channels(kernel, 2), two)


@pytest.mark.parametrize("name", ["test_resnet", "vgg19_bn", "highway19"])
def test_channels_and_classes_are_adapted_with_a_warning(tmp_path, name, caplog):
    card, variables = small_networks.card_and_variables(name)
    save(str(tmp_path / "w.npz"), variables, card)
    adapted_card, adapted = load(str(tmp_path / "w.npz"), in_channels=1, num_classes=4)
    assert "6 classes; the head for 4 is randomly initialised" in caplog.text
    assert "3 input channels; its first kernel is adapted to 1" in caplog.text
    spec = adapted_card.make_spec()
    assert adapted_card.classes == () and len(adapted_card.mean) == 1
    images = np.zeros((1, 32, 32, 1), np.float32)
    expected = jax.eval_shape(build(spec).init, jax.random.key(0), images)
    assert jax.tree.map(np.shape, adapted) == jax.tree.map(np.shape, expected)
    changed = {
        path
        for path, value in jax.tree.leaves_with_path(variables)
        if not np.array_equal(value, _at(adapted, path))
    }
    assert len(changed) == 3


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_old_files_of_bit_with_norms_of_four_axes_are_read(tmp_path):
    card, variables = small_networks.card_and_variables("resnetv2_50x1_bit")
    path = tmp_path / "w.npz"
    save(str(path), variables, card)
    with np.load(path) as file:
        tensors = dict(file)
    for name, value in tensors.items():
        if "group_norm" in name:
            tensors[name] = value[None, None, None]
    np.savez(path, **tensors)
    small_networks.assert_equal(load(str(path))[1], variables)


def test_an_npz_with_a_pickle_is_rejected(tmp_path):
    path = tmp_path / "w.npz"
    np.savez(path, **{"some/kernel": np.array([print], object)})
    with pytest.raises(UserError, match=r"'some/kernel'.*pickle, which could run code"):
        load(str(path))


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "w.h5", "w.keras"])
def test_a_file_of_garbage_is_rejected_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b"not at all")
    with pytest.raises(UserError, match=f"{tmp_path}") as error:
        load(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.npz", "There is no file"),
        ("readme.txt", r"ends in one of \.safetensors"),
        ("empty", "neither a workdir"),
    ],
)
def test_paths_without_weights_are_rejected(tmp_path, name, message):
    (tmp_path / "readme.txt").write_text("Read me.")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / name))


def test_without_torch_its_files_are_rejected_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    card, variables = small_networks.card_and_variables("test_resnet")
    with pytest.raises(UserError, match=r"Writing .*Run pip install torch, or convert"):
        save(str(tmp_path / "w.pth"), variables, card)
    with zipfile.ZipFile(tmp_path / "r.pth", "w") as archive:
        archive.writestr("r/data.pkl", b"")
    with pytest.raises(UserError, match=r"Reading .*Run pip install torch, or convert"):
        load(str(tmp_path / "r.pth"))


def test_a_card_with_an_unknown_scheme_is_rejected(tmp_path):
    card, variables = small_networks.card_and_variables("test_resnet")
    path = tmp_path / "w.npz"
    save(str(path), variables, card)
    text = dataclasses.replace(card, scheme="timn").to_json()
    files.card_path(path).write_text(text)
    with pytest.raises(
        UserError, match=r"'timn', which does not exist\. Did you mean timm"
    ):
        load(str(path))
