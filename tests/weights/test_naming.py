"""Variables are converted to names and layouts of other frameworks, and back."""

import jax
import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.models import ZOO, get_spec
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.naming import from_foreign, shapes_of, to_foreign
from tests.helpers import keyed

TIMM = SCHEMES["timm"]
# One network for each kind of names.
KINDS = [
    *("test_resnet", "seresnet18", "ecaresnet26t", "resnetrs50", "skresnet18"),
    *("skresnext50_32x4d", "resnest14d", "res2net50_26w_4s", "resnetv2_18d"),
    *("resnetv2_50d_evos", "resnetv2_50x1_bit", "nf_resnet50", "nfnet_f0"),
    *("akamaster_resnet20", "preact110", "highway19"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_variables_are_unchanged_after_a_conversion_and_back(name):
    spec, scheme = ZOO[name].spec, SCHEMES[ZOO[name].scheme]
    variables = keyed.variables(spec)
    tensors = to_foreign(variables, spec, scheme)
    assert len(tensors) == len(shapes_of(spec))
    jax.tree.map(
        np.testing.assert_array_equal, from_foreign(tensors, spec, scheme), variables
    )


def small_tensors() -> tuple:
    """Returns the tensors of a small network under timm's names, and its spec."""
    spec = get_spec("cifar_resnet20")
    return to_foreign(keyed.variables(spec), spec, TIMM), spec


def test_params_are_converted_without_statistics():
    tensors, spec = small_tensors()
    params = to_foreign({"params": keyed.variables(spec)["params"]}, spec, TIMM)
    assert params.keys() == {name for name in tensors if ".running_" not in name}


def test_the_batch_counters_of_torch_are_ignored():
    tensors, spec = small_tensors()
    tensors["bn1.num_batches_tracked"] = np.array(7)
    from_foreign(tensors, spec, TIMM)


def test_a_missing_tensor_is_named():
    tensors, spec = small_tensors()
    del tensors["layer2.0.bn1.running_var"]
    with pytest.raises(UserError, match=r"'layer2\.0\.bn1\.running_var' is missing"):
        from_foreign(tensors, spec, TIMM)


def test_a_surplus_tensor_is_named():
    tensors, spec = small_tensors()
    tensors["layer2.0.downsample.0.weight"] = np.zeros((32, 16, 1, 1))
    with pytest.raises(UserError, match=r"'layer2\.0\.downsample\.0\.weight'"):
        from_foreign(tensors, spec, TIMM)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes():
    tensors, spec = small_tensors()
    tensors["fc.weight"] = tensors["fc.weight"].T
    message = r"'fc\.weight' has the shape \(64, 10\).* \(10, 64\)"
    with pytest.raises(UserError, match=message):
        from_foreign(tensors, spec, TIMM)


def test_a_value_that_is_not_finite_is_named():
    tensors, spec = small_tensors()
    tensors["layer1.0.bn1.bias"][3] = np.nan
    with pytest.raises(UserError, match=r"'layer1\.0\.bn1\.bias' .*not finite"):
        from_foreign(tensors, spec, TIMM)
