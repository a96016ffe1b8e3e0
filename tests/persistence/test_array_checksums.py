"""Checksums of arrays change with any bit, and not with the sharding."""

import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.persistence.array_checksums import fingerprint
from tests.helpers.checkpoints import random_state


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_])
def test_a_checksum_changes_with_any_bit_and_with_the_order_of_elements(dtype):
    x = np.arange(24).reshape(4, 6) % 2 if dtype == jnp.bool_ else np.arange(24)
    x = np.array(jnp.asarray(x, dtype)).reshape(4, 6)

    def checksum(array):
        return fingerprint({"x": jnp.asarray(array)})["x"]

    checksums = {checksum(x)}
    for position in range(x.nbytes):
        raw = bytearray(x.tobytes())
        # In a boolean only the lowest bit may be set.
        raw[position] ^= 1
        changed = np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)
        checksums.add(checksum(changed))
    assert len(checksums) == 1 + x.nbytes
    swapped = x.copy()
    swapped[0, 0], swapped[0, 1] = x[0, 1], x[0, 0]
    assert checksum(swapped) != checksum(x)


def test_a_checksum_does_not_depend_on_the_number_of_devices():
    assert fingerprint(random_state(5, 8)) == fingerprint(random_state(5, 1))
