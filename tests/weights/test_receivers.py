"""The call that makes a written file's network is told and written beside it."""

import json

import pytest

from resnet_jax.convert import main
from resnet_jax.errors import UserError
from resnet_jax.models import get_spec
from resnet_jax.weights.card import default_card
from resnet_jax.weights.receivers import changed_fields, receiver_of
from resnet_jax.weights.save import save
from tests.helpers import keyed, small_networks

# They take too long for the two-minute part.
pytestmark = pytest.mark.slow

SMALL = {"stage_sizes": (1, 1, 1, 1), "widths": (8, 16, 8, 16)}

STAGES = ["stage_sizes", "widths"]


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({}, []),
        ({"num_classes": 7, "in_channels": 1}, ["num_classes", "in_channels"]),
        # None of these changes what the network computes in evaluation.
        ({"se_ratio": 0.5, "radix": 4, "alpha": 3.0, "drop_path": 0.1}, []),
        ({"zero_init_last": True, "norm_momentum": 0.5, "norm_groups": 2}, []),
        ({"output_stride": 64}, []),
        # These change the function of the same parameters.
        ({"activation": "gelu", "norm_epsilon": 1e-3}, ["norm_epsilon", "activation"]),
        ({"same_padding": True, "output_stride": 2}, ["output_stride", "same_padding"]),
        ({"pad_channels": "both"}, ["pad_channels"]),
        ({"stage_sizes": (1,), "widths": (16,)}, ["stage_sizes", "widths"]),
    ],
)
def test_a_field_counts_if_it_changes_the_network(fields, changed):
    named = get_spec("cifar_resnet20")
    assert changed_fields(get_spec("cifar_resnet20", **fields), named) == tuple(changed)


@pytest.mark.parametrize(
    ("name", "fields", "call"),
    [
        ("resnet18", {}, "timm.create_model('resnet18')"),
        ("resnet18", SMALL, "layers=(1, 1, 1, 1), channels=(8, 16, 8, 16))"),
        (
            "resnetv2_50x3_bit",
            {"widths": (96, 48, 96, 48)},
            "channels=(128, 64, 128, 64))",
        ),
        (
            "nf_resnet50",
            {"stage_sizes": (1,) * 4},
            "'nf_resnet50', depths=(1, 1, 1, 1))",
        ),
        ("torchvision_resnet18", {"num_classes": 2}, "models.resnet18(num_classes=2)"),
        ("keras_resnet50", {"num_classes": 0}, "include_top=False, pooling='avg')"),
    ],
)
def test_the_call_has_the_arguments_of_the_changes(name, fields, call):
    receiver = receiver_of(default_card(name, get_spec(name, **fields)))
    assert not receiver.impossible and receiver.call.endswith(call)


@pytest.mark.parametrize(
    ("name", "fields", "keys"),
    [
        (
            "resnet18",
            {"stem": ((3, 1, 64),), "stem_pool": "none"},
            ["stem", "stem_pool"],
        ),
        ("resnet18", {"norm_epsilon": 1e-3}, ["norm_epsilon"]),
        ("resnet18", {"stage_sizes": (2,) * 3, "widths": (64,) * 3}, STAGES),
        ("resnetv2_50x1_bit", {"stage_sizes": (1, 1, 1, 1)}, ["stage_sizes"]),
        ("seresnet18", {"se_ratio": 0.25}, ["se_ratio"]),
        ("resnet18", {"anti_alias": "blur"}, ["anti_alias"]),
        ("resnetv2_18", {"activation": "gelu"}, ["activation"]),
        ("resnetv2_50", {"widths": (64, 64, 64, 64)}, ["widths"]),
        ("resnetv2_18", {"widths": (32, 64, 96, 128)}, ["widths"]),
        ("torchvision_resnet18", {"num_classes": 0}, ["num_classes"]),
        ("torchvision_resnet18", {"widths": (8, 16, 32, 64)}, ["widths"]),
        ("keras_resnet50", {"stage_sizes": (1, 1, 1, 1)}, ["stage_sizes"]),
        ("vgg19_bn", {"hidden": 16, "num_classes": 3}, ["hidden"]),
    ],
)
def test_changes_without_arguments_are_named(name, fields, keys):
    receiver = receiver_of(default_card(name, get_spec(name, **fields)))
    assert [text.partition("=")[0] for text in receiver.impossible] == keys


def test_networks_of_no_library_have_no_receiver():
    assert receiver_of(default_card("cifar_resnet20")) is None
    assert receiver_of(default_card("resnet18", scheme="resnet_jax")) is None


def written(tmp_path, file: str, **fields) -> list[str]:
    """Converts a small network to a file; returns the names of all files."""
    card, variables = small_networks.card_and_variables("resnet18", **fields)
    save(str(tmp_path / "own"), variables, card)
    (tmp_path / "out").mkdir(exist_ok=True)
    main(["convert", str(tmp_path / "own"), str(tmp_path / "out" / file)])
    return sorted(path.name for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("file", "config"),
    [
        ("model.safetensors", "config.json"),
        ("r18.safetensors", "r18.safetensors.config.json"),
        ("r18.npz", "r18.npz.config.json"),
    ],
)
def test_convert_tells_and_writes_the_arguments_of_timm(tmp_path, file, config, capsys):
    fields = {"stem": ((7, 2, 64),)} | SMALL
    assert config in written(tmp_path, file, **fields)
    printed = capsys.readouterr().out
    assert "timm loads it into timm.create_model('resnet18', layers=(1, 1" in printed
    assert f"The arguments are in {config} as well." in printed
    content = json.loads((tmp_path / "out" / config).read_text())
    assert content["architecture"] == "resnet18"
    expected = {
        "layers": [1, 1, 1, 1],
        "channels": [8, 16, 8, 16],
        "num_classes": 6,
    }
    assert content["model_args"] == expected


def test_convert_names_the_keys_that_timm_cannot_change(tmp_path, capsys):
    fields = {"stem": ((7, 2, 64),)} | SMALL
    written(tmp_path, "w.safetensors", **fields)
    # The config of the former file is removed with it.
    assert written(tmp_path, "w.safetensors", head_pool=2, **fields) == [
        "w.safetensors"
    ]
    printed = capsys.readouterr().out
    assert "timm cannot make this network" in printed
    assert "its resnet18 in head_pool=2; only resnet_jax loads this file" in printed


def test_a_config_of_another_program_is_not_replaced(tmp_path):
    (tmp_path / "config.json").write_text('{"workdir": 1}')
    card = default_card("cifar_resnet20")
    variables = keyed.variables(card.make_spec())
    with pytest.raises(UserError, match=r"config\.json is not timm's"):
        save(str(tmp_path / "model.safetensors"), variables, card)
    assert (tmp_path / "config.json").read_text() == '{"workdir": 1}'
    assert not (tmp_path / "model.safetensors").exists()
