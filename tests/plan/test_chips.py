"""How topologies are named."""

import pytest

from resnet_jax.errors import UserError
from resnet_jax.plan.chips import CHIPS, LOCAL, chip_of, chip_of_device


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5:2x4", r"Did you mean v5[ep]"),
        ("v5f:2x4", r"Did you mean v5"),
        ("h100:8", r"Known: local, v3, v4, v5e, v5p, v6e, tpu7x\."),
        ("", r"Known: local"),
        ("v5e", r"no shape of a slice; write v5e:2x2, say\."),
        ("v5e:8", r"no shape"),
        ("v4:2x2x0", r"no shape of a slice; write v4:2x2x4, say\."),
        ("v5e-8", r"There is no topology 'v5e-8'\."),
        ("v5e:2x4x2", r"three sides, but .* v5e lie in two; write v5e:2x8, say\."),
        ("v6e:32x32", r"has 1,024 chips, but a pod of v6e has 256;"),
    ],
)
def test_an_unknown_topology_is_answered_with_the_known_ones(topology, message):
    with pytest.raises(UserError, match=message):
        chip_of(topology)


@pytest.mark.parametrize("topology", ["v5e:2x4x1", "v5e:16x16", "v4:16x16x16", LOCAL])
def test_slices_that_can_be_are_known(topology):
    assert chip_of(topology) == topology.partition(":")[0].replace(LOCAL, "")


def test_devices_are_known_by_what_jax_calls_them():
    for name, chip in CHIPS.items():
        assert chip_of_device(chip.kind) == name
    assert chip_of_device("cpu") == ""
