"""The gradient of max pooling on CPUs finds the maxima once."""

import jax
import jax.numpy as jnp
import pytest

from resnet_jax.kernels.geometry import Geometry
from resnet_jax.kernels.pool import max_pool


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_winning_taps_are_written_to_memory(dtype):
    """Otherwise XLA would find them again for each tap."""

    def gradient(x):
        return jax.grad(lambda x: max_pool(x, 3, Geometry(2)).sum())(x)

    program = jax.jit(gradient).lower(jnp.zeros((2, 8, 8, 4), dtype)).compile()
    _, _, entry = program.as_text().partition("ENTRY")
    assert "= u8[" in entry
