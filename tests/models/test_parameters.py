"""Parameters are Flax's, without the tracing of what made them."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models.parameters import parameter

SHAPE = (3, 5)
KEY = jax.random.key(0)


class Ours(nn.Module):
    init_weight: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self):
        return parameter(self, "weight", self.init_weight, SHAPE)


class Flaxs(nn.Module):
    @nn.compact
    def __call__(self):
        init = nn.initializers.lecun_normal()
        return self.param("weight", init, SHAPE, jnp.float32)


def test_parameters_start_as_those_of_flax():
    found, expected = Ours().init(KEY), Flaxs().init(KEY)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_a_parameter_that_is_there_is_taken(kind):
    value = kind(np.arange(15.0, dtype=np.float32).reshape(SHAPE))
    given = Ours().apply({"params": {"weight": value}})
    np.testing.assert_array_equal(given, value)


def test_the_initialiser_is_traced_only_where_there_is_no_parameter():
    traced = []

    def init(key, shape, dtype):
        traced.append(shape)
        return jnp.zeros(shape, dtype)

    module = Ours(init)
    variables = module.init(KEY)
    assert traced == [SHAPE]
    module.apply(variables)
    assert traced == [SHAPE]


def test_a_parameter_of_another_shape_is_the_error_of_flax():
    with pytest.raises(flax.errors.ScopeParamShapeError, match=r"\(3, 5\)"):
        Ours().apply({"params": {"weight": jnp.zeros((3, 4))}})
