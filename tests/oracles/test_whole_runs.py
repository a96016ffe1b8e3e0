"""`python -m tests.oracles.whole_runs`: two sides that can be compared."""

from pathlib import Path

import pytest
from torch import nn

from resnet_jax.models import build, get_spec
from resnet_jax.models.cost import count, init_shapes
from tests.oracles import whole_runs


@pytest.mark.parametrize("network", whole_runs.RECIPES)
def test_both_sides_have_the_same_layers(network):
    config = whole_runs.make_config(network, whole_runs.DATA["signs"], Path("."), 0)
    spec = get_spec(config.model.name, **config.model.overrides, num_classes=6)
    ours = init_shapes(build(spec), whole_runs.SIZE)["params"]
    theirs = whole_runs.make_torch(network, 6)
    assert count(ours) == sum(p.numel() for p in theirs.parameters())
    norms = [part for part in theirs.modules() if isinstance(part, nn.BatchNorm2d)]
    # A residual block's last norm begins at zero on both sides, or on neither.
    zeros = sum(not norm.weight.any() for norm in norms)
    assert zeros == spec.zero_init_last * sum(spec.stage_sizes)


def test_means_within_two_standard_errors_are_told_from_others():
    # Two deviations of 1 %, of three runs each: an error of sqrt(2 / 3) % = 0.82 %.
    ours, theirs = [0.79, 0.80, 0.81], [0.80, 0.81, 0.82]
    assert whole_runs.verdict(ours, theirs) == (
        "difference -1.00, within two standard errors (1.63)"
    )
    far = [top1 + 0.01 for top1 in theirs]
    assert "-2.00, NOT within two" in whole_runs.verdict(ours, far)
