"""Tests that both sides of `python -m tests.oracles.whole_runs` are comparable."""

from pathlib import Path

import pytest
from torch import nn

from resnet_jax.models import build, get_spec
from resnet_jax.models.cost import count, init_shapes
from tests.oracles import whole_runs


@pytest.mark.parametrize("network", whole_runs.RECIPES)
def test_our_network_and_the_reference_have_the_same_layers(network):
    config = whole_runs.make_config(network, whole_runs.DATA["signs"], Path("."), 0)
    spec = get_spec(config.model.name, **config.model.overrides, num_classes=6)
    ours = init_shapes(build(spec), whole_runs.SIZE)["params"]
    theirs = whole_runs.make_torch(network, 6)
    assert count(ours) == sum(p.numel() for p in theirs.parameters())
    norms = [part for part in theirs.modules() if isinstance(part, nn.BatchNorm2d)]
    # A residual block's last norm starts at zero on both sides or on neither.
    zeros = sum(not norm.weight.any() for norm in norms)
    assert zeros == spec.zero_init_last * sum(spec.stage_sizes)


def test_the_table_gives_means_deviations_and_welchs_p():
    top1 = {"resnet_jax": (0.79, 0.80, 0.81), "torch": (0.80, 0.81, 0.82)}
    rows = [
        {"network": "plain20", "data": "tiny", "epochs": 4, "side": side, "top1": value}
        for side, values in top1.items()
        for value in values
    ]
    # t = 1 / sqrt(2 / 3) = 1.2247 with four degrees of freedom.
    assert whole_runs.table(rows).splitlines()[2] == (
        "| plain20 | tiny | 4 | 3 + 3 | 80.00 ± 1.00 | 81.00 ± 1.00 | -1.00 | 0.29 |"
    )
