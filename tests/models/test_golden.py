"""Our networks against figures that the reference libraries gave."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import ResNet, get_spec, list_models
from resnet_jax.weights.torchvision import from_torch, to_torch
from tests import keyed
from tests.models.names import deep_ones_slow

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "logits.json").read_text())


def test_every_network_of_the_zoo_has_golden_logits():
    assert list(GOLDEN) == list_models()


@pytest.mark.parametrize("name", deep_ones_slow(GOLDEN))
def test_logits_equal_the_golden_figures(name):
    spec = get_spec(name)
    variables = jax.tree.map(jnp.asarray, keyed.variables(spec))
    for size in keyed.golden_sizes(spec):
        images = jnp.asarray(keyed.images(2, size))
        # Without jit, equal layers share what is compiled, here and between networks.
        with jax.default_matmul_precision("highest"):
            logits = np.asarray(ResNet(spec).apply(variables, images))
        expected = np.asarray(GOLDEN[name][str(size)])
        # Float32 rounds at 6e-8; 1e-6 of the scale was measured against the oracles.
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(
            keyed.golden_sample(logits), expected, rtol=0, atol=atol
        )


def small_tensors() -> tuple:
    spec = get_spec("cifar_resnet20")
    return to_torch(keyed.variables(spec), spec), spec


def test_variables_go_to_torch_names_and_back_unchanged():
    tensors, spec = small_tensors()
    again = to_torch(from_torch(tensors, spec), spec)
    assert again.keys() == tensors.keys()
    for name, value in again.items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)


def test_params_alone_go_to_torch_names():
    tensors, spec = small_tensors()
    params = to_torch({"params": keyed.variables(spec)["params"]}, spec)
    assert params.keys() == {name for name in tensors if ".running_" not in name}


def test_the_batch_counter_of_torch_is_dropped():
    tensors, spec = small_tensors()
    tensors["bn1.num_batches_tracked"] = np.array(7)
    from_torch(tensors, spec)


def test_a_missing_tensor_is_named():
    tensors, spec = small_tensors()
    del tensors["layer2.0.bn1.running_var"]
    with pytest.raises(UserError, match=r"'layer2\.0\.bn1\.running_var' is missing"):
        from_torch(tensors, spec)


def test_a_surplus_tensor_is_named():
    tensors, spec = small_tensors()
    tensors["layer2.0.downsample.0.weight"] = np.zeros((32, 16, 1, 1))
    with pytest.raises(UserError, match=r"'layer2\.0\.downsample\.0\.weight'"):
        from_torch(tensors, spec)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes():
    tensors, spec = small_tensors()
    tensors["linear.weight"] = tensors["linear.weight"].T
    message = r"'linear\.weight' has the shape \(64, 10\).* \(10, 64\)"
    with pytest.raises(UserError, match=message):
        from_torch(tensors, spec)
