"""Networks are found in files that hold more or less than a network with its head."""

import dataclasses

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from resnet_jax.errors import UserError
from resnet_jax.models import ZOO, get_spec
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.load import load, read
from resnet_jax.weights.naming import to_foreign
from resnet_jax.weights.recognition import flatten, head_root
from resnet_jax.weights.save import save
from tests.helpers import keyed, small_networks

NAME = "test_resnet"


def small(name: str, **fields) -> tuple[dict, dict]:
    """Returns a small network's tensors by their names, and the fields of its spec."""
    spec = small_networks.spec_of(name, **fields)
    tensors = to_foreign(keyed.variables(spec), spec, SCHEMES[ZOO[name].scheme])
    changed = {
        key: value
        for key, value in dataclasses.asdict(spec).items()
        if value != getattr(get_spec(name), key)
    }
    return tensors, changed


def write(path, tensors) -> str:
    """Writes a safetensors file as other programs do; returns its path."""
    save_file({name: np.array(x, order="C") for name, x in tensors.items()}, path)
    return str(path)


def backbone_of(name: str, tensors: dict) -> dict:
    """Returns the tensors without the head's."""
    spec = small_networks.spec_of(name)
    root = head_root(spec, SCHEMES[ZOO[name].scheme])
    backbone = {k: x for k, x in tensors.items() if not k.startswith(root)}
    assert len(tensors) - len(backbone) == 2
    return backbone


def body_of(variables: dict) -> dict:
    """Returns variables without the head's."""
    params = {k: x for k, x in variables["params"].items() if k != "head"}
    return {**variables, "params": params}


@pytest.mark.parametrize("name", small_networks.NAMES)
def test_a_file_without_a_head_is_read_without_one(tmp_path, name, caplog):
    tensors, fields = small(name)
    path = write(tmp_path / "w.safetensors", backbone_of(name, tensors))
    fields.pop("num_classes", None)
    card, variables = read(path, model=name, **fields)
    assert card.spec["num_classes"] == 0 and card.classes == ()
    expected = keyed.variables(small_networks.spec_of(name))
    small_networks.assert_equal(variables, body_of(expected))
    # A head of any number of classes is made by request.
    card, variables = load(path, model=name, **fields, num_classes=3)
    assert f"{path} has no head; the head for 3 is randomly initialised" in caplog.text
    assert variables["params"]["head"]["kernel"].shape[1] == 3


@pytest.mark.parametrize("name", small_networks.NAMES)
def test_another_head_is_left_out_with_a_word_that_names_it(tmp_path, name, caplog):
    tensors, fields = small(name)
    scheme = SCHEMES[ZOO[name].scheme]
    root = head_root(small_networks.spec_of(name), scheme)
    others = [f"{root}0{scheme.separator}x", f"{root}2{scheme.separator}x"]
    mlp = {other: np.ones((5, 5), np.float32) for other in others}
    path = write(tmp_path / "w.safetensors", backbone_of(name, tensors) | mlp)
    card, variables = read(path, model=name, **fields)
    assert card.spec["num_classes"] == 0
    expected = keyed.variables(small_networks.spec_of(name))
    small_networks.assert_equal(variables, body_of(expected))
    assert "no place for, which are left out: " in caplog.text
    assert sum(f"({n})" in caplog.text for n in (1, 2)) == 1


@pytest.mark.parametrize("name", small_networks.NAMES)
def test_a_head_of_any_number_of_classes_is_read(tmp_path, name):
    tensors, fields = small(name, num_classes=4)
    path = write(tmp_path / "w.safetensors", tensors)
    card, variables = read(path, model=name, **fields | {"num_classes": 9})
    assert card.spec["num_classes"] == 4
    expected = keyed.variables(small_networks.spec_of(name, num_classes=4))
    small_networks.assert_equal(variables, expected)


@pytest.mark.parametrize(
    "prefix",
    [
        *("module.", "_orig_mod.module.", "model.", "net.", "encoder.", "backbone."),
        *("module.encoder_q.", "online_encoder.net.", "teacher.backbone."),
        *("state_dict.model.", "opt_model.", "features.", "trunk._feature_blocks."),
    ],
)
def test_names_are_found_under_any_prefix(tmp_path, prefix, caplog):
    tensors, fields = small(NAME)
    prefixed = {prefix + name: value for name, value in tensors.items()}
    path = write(tmp_path / "w.safetensors", prefixed)
    expected = keyed.variables(small_networks.spec_of(NAME))
    small_networks.assert_equal(load(path, model=NAME, **fields)[1], expected)
    assert not caplog.text


@pytest.mark.parametrize("name", small_networks.NAMES)
def test_all_schemes_are_found_under_a_prefix(tmp_path, name):
    tensors, fields = small(name)
    separator = SCHEMES[ZOO[name].scheme].separator
    prefixed = {f"net{separator}{key}": value for key, value in tensors.items()}
    path = write(tmp_path / "w.safetensors", prefixed)
    expected = keyed.variables(small_networks.spec_of(name))
    small_networks.assert_equal(load(path, model=name, **fields)[1], expected)


def scaled(tensors: dict, prefix: str, factor: float) -> dict:
    """Returns tensors under a prefix, and with other values."""
    return {prefix + name: x * np.float32(factor) for name, x in tensors.items()}


@pytest.mark.parametrize(
    ("preferred", "second"),
    [
        ("module.encoder_q.", "module.encoder_k."),
        ("encoder_q.", "encoder_k."),
        ("online_encoder.net.", "target_encoder.net."),
        ("backbone.", "momentum_backbone."),
        ("teacher.backbone.", "student.backbone."),
        ("state_dict_ema.", "state_dict."),
        ("model_ema.", "model."),
        ("ema_model.module.", ""),
        ("model.", "model.best.inner."),
    ],
)
def test_the_order_of_preference_is_logged_and_can_be_changed(
    tmp_path, preferred, second, caplog
):
    tensors, fields = small(NAME)
    both = scaled(tensors, second, 2) | scaled(tensors, preferred, 1)
    path = write(tmp_path / "w.safetensors", both)
    expected = keyed.variables(small_networks.spec_of(NAME))
    small_networks.assert_equal(load(path, model=NAME, **fields)[1], expected)
    shown = preferred.rstrip("."), second.rstrip(".")
    assert f"at {shown[0]!r} is taken; choose another" in caplog.text
    assert f"where PREFIX is {shown[1]!r}" in caplog.text
    assert "left out" not in caplog.text
    chosen = load(f"{path}#{shown[1]}", model=NAME, **fields)[1]
    twice = jax.tree.map(lambda x: x * np.float32(2), expected)
    small_networks.assert_equal(chosen, twice)


@pytest.mark.parametrize(
    ("prefix", "extra", "named"),
    [
        ("", ["projector.0.weight", "projector.0.bias"], "projector (2)"),
        ("", ["queue", "queue_ptr", "predictor.3.bias"], "queue (1), queue_ptr (1)"),
        ("module.encoder_q.", ["module.queue"], "module.queue (1)"),
        ("backbone.", ["head.mlp.0.weight", "head.last.weight_v"], "head (2)"),
        ("m.net.", ["m.net.neck.fc0.weight", "m.loss.w"], "m.loss (1), m.net.neck (1)"),
    ],
)
def test_modules_beside_the_network_are_left_out_with_a_word(
    tmp_path, prefix, extra, named, caplog
):
    tensors, fields = small(NAME)
    tensors = scaled(tensors, prefix, 1)
    tensors |= {name: np.ones(2, np.float32) for name in extra}
    path = write(tmp_path / "w.safetensors", tensors)
    expected = keyed.variables(small_networks.spec_of(NAME))
    small_networks.assert_equal(load(path, model=NAME, **fields)[1], expected)
    assert named in caplog.text


def test_the_state_of_an_optimizer_is_left_out_without_a_word(tmp_path, caplog):
    tensors, fields = small(NAME)
    extra = {f"optimizer.state.{i}.exp_avg": np.ones(3, np.float32) for i in range(9)}
    extra |= {"scaler.scale": np.ones(1, np.float32), "bn1.num_batches_tracked": 3}
    path = write(tmp_path / "w.safetensors", tensors | extra)
    load(path, model=NAME, **fields)
    assert not caplog.text


@pytest.mark.parametrize(
    "surplus",
    ["layer2.1.conv1.weight", "layer3.0.conv1.weight", "bn2.weight", "conv2.weight"],
)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_nothing_of_the_backbone_is_left_out(tmp_path, surplus, prefix):
    tensors, fields = small(NAME)
    surplus = surplus.replace("layer2.1", "layer2.7")
    tensors[surplus] = np.ones(3, np.float32)
    path = write(tmp_path / "w.safetensors", scaled(tensors, prefix, 1))
    with pytest.raises(UserError, match=rf"no place for the tensor '{surplus}'"):
        load(path, model=NAME, **fields)


@pytest.mark.parametrize("prefix", ["", "module.encoder_q."])
def test_nothing_of_the_backbone_may_be_missing(tmp_path, prefix):
    tensors, fields = small(NAME)
    del tensors["layer1.0.bn2.running_var"]
    path = write(tmp_path / "w.safetensors", scaled(tensors, prefix, 1))
    with pytest.raises(UserError, match=r"'layer1\.0\.bn2\.running_var' is missing"):
        load(path, model=NAME, **fields)


@pytest.mark.parametrize("head", ["head.fc", "fc", "classifier", "linear"])
def test_a_linear_layer_beside_the_backbone_is_the_head(tmp_path, head, caplog):
    tensors, fields = small(NAME)
    moved = {f"{head}.{leaf}": tensors.pop(f"fc.{leaf}") for leaf in ("weight", "bias")}
    path = write(tmp_path / "w.safetensors", scaled(tensors, "backbone.", 1) | moved)
    expected = keyed.variables(small_networks.spec_of(NAME))
    small_networks.assert_equal(load(path, model=NAME, **fields)[1], expected)
    assert f"has the head of {NAME} at {head!r}" in caplog.text


@pytest.mark.parametrize("prefix", ["", "state_dict.encoder_q."])
@pytest.mark.parametrize("name", ["cifar_resnet20", "akamaster_resnet20", "highway19"])
def test_a_backbone_is_recognised_without_its_name(tmp_path, name, prefix, caplog):
    spec = get_spec(name)
    tensors = to_foreign(keyed.variables(spec), spec, SCHEMES[ZOO[name].scheme])
    full = write(tmp_path / "w.safetensors", scaled(tensors, prefix, 1))
    assert load(full)[0].network == name
    root = head_root(spec, SCHEMES[ZOO[name].scheme])
    backbone = {key: x for key, x in tensors.items() if not key.startswith(root)}
    path = write(tmp_path / "b.safetensors", scaled(backbone, prefix, 1))
    caplog.clear()
    card, _ = load(path)
    assert card.spec["num_classes"] == 0
    assert card.network == name or f", {name}" in caplog.text


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        (["cls_token", "pos_embed", "blocks.0.attn.qkv.weight"], "vision transformer"),
        (["downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"], "ConvNeXt"),
        (["s1.b1.conv1.conv.weight", "stem.conv.weight"], "RegNet"),
        (["conv_stem.weight", "blocks.0.0.conv_dw.weight"], "EfficientNet"),
        (["features.denseblock1.denselayer1.norm1.weight"], "DenseNet"),
        (["optimizer.state.0.exp_avg", "lr_scheduler.x"], "optimizer and no network"),
        (["layer1.0.conv1.lora_A.weight"], r"changes of a network \(LoRA\)"),
        (["conv1.weight", "conv1.zero_point", "conv1.scale"], "quantised network"),
        ([], "has no tensors"),
        (["some.weight", "some.bias"], r"has 2 tensors \('some\.bias', 'some\.weight'"),
    ],
)
@pytest.mark.parametrize("model", [None, "cifar_resnet20"])
def test_the_error_for_other_content_says_what_it_is(tmp_path, names, looks, model):
    path = tmp_path / "w.safetensors"
    write(path, {name: np.ones((2, 2), np.float32) for name in names})
    with pytest.raises(UserError, match=looks) as error:
        load(str(path), model=model)
    if model:
        assert "does not fit cifar_resnet20" in str(error.value)
        assert "'conv1.weight'" in str(error.value)


def test_the_error_for_another_network_names_the_one_that_fits(tmp_path):
    spec = get_spec("akamaster_resnet20")
    tensors = to_foreign(keyed.variables(spec), spec, SCHEMES["akamaster"])
    path = write(tmp_path / "w.safetensors", tensors)
    with pytest.raises(
        UserError, match=r"not fit cifar_resnet32: .* is missing\..*"
    ) as error:
        load(path, model="cifar_resnet32")
    assert str(error.value).endswith("It fits akamaster_resnet20.")


def test_a_prefix_without_a_network_is_rejected(tmp_path):
    tensors, fields = small(NAME)
    path = write(tmp_path / "w.safetensors", tensors)
    with pytest.raises(UserError, match=r"no network at 'ema'.*test_resnet is at ''"):
        load(f"{path}#ema", model=NAME, **fields)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "bool"])
def test_only_floating_types_are_weights(tmp_path, dtype):
    tensors, fields = small(NAME)
    tensors["layer1.0.conv1.weight"] = tensors["layer1.0.conv1.weight"].astype(dtype)
    path = tmp_path / "w.npz"
    np.savez(path, **tensors)
    if dtype.startswith("float"):
        load(str(path), model=NAME, **fields)
        return
    with pytest.raises(UserError, match=rf"'layer1\.0\.conv1\.weight'.*{dtype}"):
        load(str(path), model=NAME, **fields)


@pytest.mark.parametrize("shape", [(1, -1), (1, 1, 1, -1), (-1, 1, 1)])
def test_axes_of_length_one_do_not_count(tmp_path, shape):
    tensors, fields = small(NAME)
    for name in tensors:
        if name.startswith("layer1.0.bn"):
            tensors[name] = tensors[name].reshape(shape)
    tensors["fc.weight"] = tensors["fc.weight"][..., None, None]
    path = write(tmp_path / "w.safetensors", tensors)
    expected = keyed.variables(small_networks.spec_of(NAME))
    small_networks.assert_equal(load(path, model=NAME, **fields)[1], expected)


def test_the_error_for_a_transposed_kernel_says_so(tmp_path):
    tensors, fields = small(NAME)
    tensors["conv1.0.weight"] = tensors["conv1.0.weight"].transpose(2, 3, 1, 0)
    path = write(tmp_path / "w.safetensors", tensors)
    with pytest.raises(UserError, match=r"another order, so transpose it"):
        load(path, model=NAME, **fields)


@pytest.mark.parametrize("target", ["w.npz", "own", "w.safetensors"])
def test_weights_without_a_head_are_written_and_read_again(tmp_path, target):
    tensors, fields = small(NAME)
    path = write(tmp_path / "in.safetensors", backbone_of(NAME, tensors))
    fields.pop("num_classes", None)
    card, variables = load(path, model=NAME, **fields)
    save(str(tmp_path / target), variables, card)
    again, loaded = load(str(tmp_path / target))
    small_networks.assert_equal(loaded, variables)
    assert again.spec == card.spec and not again.spec["num_classes"]


@pytest.mark.parametrize(
    ("checkpoint", "flat"),
    [
        ({"conv.weight": 1.0}, {"conv.weight": 1.0}),
        ({"state_dict": {"a": 1.0}, "best_prec1": 9}, {"state_dict.a": 1.0}),
        ({"a": {"b": {"c": 1.0}, 0: 2.0}, "x": [3.0]}, {"a.b.c": 1.0, "a.0": 2.0}),
    ],
)
def test_checkpoints_are_flattened(checkpoint, flat):
    assert flatten(checkpoint, float) == flat
