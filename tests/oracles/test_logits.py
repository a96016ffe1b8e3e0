"""The logits of every network that has a reference in torch, tested against it."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from resnet_jax.models import ZOO
from resnet_jax.models.zoo import ALIASES
from tests.helpers import keyed
from tests.helpers.network_names import one_of_each_kind
from tests.oracles import compare, networks

GOLDEN = Path(__file__).parents[1] / "golden" / "logits.json"
IN_TORCH = [name for name, entry in ZOO.items() if entry.oracle not in ("", "keras")]


@pytest.mark.parametrize("name", one_of_each_kind(IN_TORCH))
def test_logits_equal_the_reference_and_the_golden_figures(name):
    variables = keyed.variables(ZOO[name].spec)
    reference = networks.build(name, variables)
    sizes = keyed.sizes(ZOO[name].spec)
    compare.assert_logits_equal(name, variables, reference, sizes)

    fresh = keyed.golden_sample(networks.logits(reference, keyed.images(1, sizes[0])))
    kept = json.loads(GOLDEN.read_text()).get(name)
    assert kept, "run python -m tests.oracles.make_golden"
    # Another machine may sum in another order in float32.
    atol = compare.LOGITS_BOUND * np.abs(fresh).max()
    np.testing.assert_allclose(kept, fresh, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [224, 225])
@pytest.mark.parametrize("depth", [18, 50, pytest.param(152, marks=pytest.mark.long)])
def test_logits_equal_torchvision_at_full_size(depth, size):
    # At odd sizes 'SAME' and torch's padding coincide, so wrong padding shows at even
    # ones.
    name = f"torchvision_resnet{depth}"
    variables = keyed.variables(ZOO[name].spec)
    reference = networks.build(name, variables)
    compare.assert_logits_equal(name, variables, reference, [size])


def test_parameter_counts_equal_timm():
    both = [name for name in ZOO if name in set(timm.list_models())]
    assert len(both) >= 81 + 20 + 5 + 8 + 9 + 1 + 7 + 7
    ours = {name: ZOO[name].params for name in both}
    with torch.device("meta"):
        theirs = {
            name: sum(p.numel() for p in timm.create_model(name).parameters())
            for name in both
        }
    assert ours == theirs


def test_every_entry_point_of_timm_is_in_the_zoo():
    modules = ("resnet", "resnetv2", "sknet", "resnest", "res2net")
    theirs = [name for module in modules for name in timm.list_models(module=module)]
    assert len(theirs) == 81 + 20 + 5 + 8 + 9
    assert set(theirs) <= set(ZOO)


def test_deprecated_names_map_to_the_same_names_as_in_timm():
    theirs = timm.models._registry._module_to_deprecated_models
    assert {**theirs["resnet"], **theirs["resnetv2"]} == ALIASES
