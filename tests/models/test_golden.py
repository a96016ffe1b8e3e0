"""The logits of every network, tested against those of the reference libraries."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models import ZOO, build, list_models
from tests.helpers import keyed
from tests.helpers.network_names import deep_ones_slow

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "logits.json").read_text())


def test_every_network_of_the_zoo_has_golden_logits():
    assert list(GOLDEN) == list_models()


@pytest.mark.parametrize("name", deep_ones_slow(GOLDEN, pytest.mark.long))
def test_logits_equal_the_golden_figures(name):
    spec = ZOO[name].spec
    images = jnp.asarray(keyed.images(1, keyed.sizes(spec)[0]))
    # Without jit, equal layers share their compiled programs, even across networks.
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(build(spec).apply(keyed.variables(spec), images))
    expected = np.asarray(GOLDEN[name])
    # Float32 rounds at 6e-8. The largest difference that was measured against the
    # references is 2e-5 of the largest logit.
    atol = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(keyed.golden_sample(logits), expected, rtol=0, atol=atol)
