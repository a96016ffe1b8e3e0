"""The golden figures are what the references give today."""

import json

import numpy as np
import pytest

from resnet_jax.models import list_models
from tests.oracles import make_golden


@pytest.mark.parametrize("name", list_models())
def test_golden_logits_are_those_of_the_reference(name):
    kept = json.loads(make_golden.GOLDEN.read_text()).get(name, {})
    fresh = make_golden.figures(name)
    assert kept.keys() == fresh.keys(), "run python -m tests.oracles.make_golden"
    for size, values in fresh.items():
        # Seven digits were kept of figures computed in float64.
        atol = 1e-6 * np.abs(values).max()
        np.testing.assert_allclose(kept[size], values, rtol=0, atol=atol)
