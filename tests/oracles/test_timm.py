"""Our networks against timm's of the same name and definition."""

import pytest
import timm
import torch

from resnet_jax.models import ZOO, get_spec, list_models
from tests.oracles import compare, networks

NAMES = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_timm(name):
    reference = networks.fill(timm.create_model(name))
    compare.assert_logits_equal(reference, get_spec(name), (64, 65))


def test_parameter_counts_equal_timm():
    both = set(list_models()) & set(timm.list_models())
    assert both >= set(NAMES)
    ours = {name: ZOO[name].params for name in both}
    with torch.device("meta"):
        theirs = {
            name: sum(p.numel() for p in timm.create_model(name).parameters())
            for name in both
        }
    assert ours == theirs
