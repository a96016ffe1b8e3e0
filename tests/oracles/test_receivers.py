"""Changed networks are made by timm and torchvision with the arguments given."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file

from resnet_jax.models import build, get_spec
from resnet_jax.weights.card import default_card
from resnet_jax.weights.receivers import receiver_of
from resnet_jax.weights.save import save
from tests.helpers import keyed
from tests.oracles import networks
from tests.oracles.compare import LOGITS_BOUND, relative_error

SMALL = {"stage_sizes": (1, 1, 1, 1)}
DEEP = ((3, 2, 24), (3, 1, 24), (3, 1, 48))
TIERED = ((3, 2, 24), (3, 1, 32), (3, 1, 64))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("resnet18", {"num_classes": 7}),
        ("resnet18", {"num_classes": 0}),
        ("resnet18", {"in_channels": 1, "widths": (32, 48, 64, 96)}),
        ("resnet18", SMALL | {"stem": DEEP, "shortcut_pool": True}),
        ("resnet18", SMALL | {"stem": TIERED, "stem_pool": "conv"}),
        ("resnet18", SMALL | {"activation": "silu", "attention": "se"}),
        ("resnet18", SMALL | {"attention": "eca", "activation": "gelu"}),
        ("resnet18", SMALL | {"norm": "group", "output_stride": 8}),
        ("resnet50", SMALL | {"groups": 4, "base_width": 32, "reduce_first": 2}),
        ("resnet50", SMALL | {"shortcut_kernel": 3, "output_stride": 16}),
        ("resnet50d", SMALL | {"stem": ((7, 2, 64),), "shortcut_pool": False}),
        ("seresnet18", SMALL | {"attention": None}),
        ("resnet50_gn", SMALL | {"norm": "batch"}),
        ("skresnet18", SMALL | {"widths": (32, 64, 96, 128)}),
        ("resnest14d", {"num_classes": 3}),
        ("res2net50_26w_4s", SMALL),
        ("resnetrs50", SMALL | {"widths": (32, 64, 96, 128)}),
        ("resnetv2_50", SMALL | {"widths": (32, 64, 96, 128), "num_classes": 3}),
        ("resnetv2_50x1_bit", {"output_stride": 8}),
        ("resnetv2_50x3_bit", {"widths": (96, 192, 384, 192)}),
        ("resnetv2_18", SMALL | {"widths": (64, 96, 128, 160)}),
        ("nf_resnet50", SMALL | {"widths": (32, 64, 96, 128), "num_classes": 0}),
        ("nfnet_f0", SMALL | {"final_width": 512, "in_channels": 4}),
    ],
)
def test_timm_makes_a_changed_network_from_the_config(tmp_path, name, fields):
    spec = get_spec(name, **fields)
    variables = keyed.variables(spec)
    save(str(tmp_path / "model.safetensors"), variables, default_card(name, spec))
    config = json.loads((tmp_path / "config.json").read_text())
    network = timm.create_model(config["architecture"], **config["model_args"])
    network.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert_logits_are_equal(spec, variables, network)
    # timm also does this by itself.
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    for key, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def assert_logits_are_equal(spec, variables, network) -> None:
    """Compares logits at 64 pixels with those of a network of torch."""
    images = keyed.generator("images").standard_normal(
        (1, 64, 64, spec.in_channels), np.float32
    )
    theirs = networks.logits(network, images)
    ours = np.asarray(build(spec).apply(variables, jnp.asarray(images)))
    assert relative_error(ours, theirs) <= LOGITS_BOUND


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("torchvision_resnet18", {"num_classes": 7}),
        ("torchvision_resnet50", {"groups": 4, "base_width": 32}),
        ("torchvision_resnet50", {"output_stride": 8, "num_classes": 5}),
        ("torchvision_resnet50", {"output_stride": 16}),
    ],
)
def test_torchvision_makes_a_changed_network_by_the_call(tmp_path, name, fields):
    spec = get_spec(name, **fields)
    variables = keyed.variables(spec)
    card = save(str(tmp_path / "w.safetensors"), variables, default_card(name, spec))
    receiver = receiver_of(card)
    assert not receiver.impossible
    network = eval(receiver.call, {"torchvision": torchvision})
    network.load_state_dict(load_file(tmp_path / "w.safetensors"), strict=True)
    assert_logits_are_equal(spec, variables, network)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
