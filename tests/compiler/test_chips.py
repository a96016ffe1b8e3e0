"""Names of topologies, and of devices."""

import pytest

from resnet_jax.compiler.chips import (
    CHIPS,
    LOCAL,
    chip_of,
    chip_of_device,
    sides_of,
    slices_of,
)
from resnet_jax.errors import UserError


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5:2x4", r"Did you mean v5[ep]"),
        ("v5f:2x4", r"Did you mean v5"),
        ("h100:8", r"Known: local, v3, v4, v5e, v5p, v6e, tpu7x\."),
        ("", r"Known: local"),
        ("v5e", r"no valid shape of a slice; .* example, v5e:2x2\."),
        ("v5e:8", r"no valid shape"),
        ("v4:2x2x0", r"no valid shape of a slice; .* example, v4:2x2x4\."),
        ("v5e-8", r"There is no topology 'v5e-8'\."),
        ("v5e:2x4x2", r"three sides, but .* v5e have two; .* v5e:2x8\."),
        ("v6e:32x32", r"has 1,024 chips, but a pod of v6e has 256; .* 2\*v6e:SHAPE"),
        ("2*v6e:32x32", r"'v6e:32x32' has 1,024 chips"),
        ("0*v5e:2x4", r"'0' slices, which is not a number from 1 to 1,024; .* 2\*"),
        ("x*v5e:2x4", r"'x' slices, .*; write, for example, 2\*v5e:2x4\."),
        ("-1*v5e:2x4", r"'-1' slices"),
        ("1.5*v5e:2x4", r"'1\.5' slices"),
        ("*v5e:2x4", r"'' slices"),
        ("2*2*v5e:2x4", r"'2\*2' slices"),
        ("1025*v5e:2x4", r"'1025' slices"),
        ("2*v5e", r"no valid shape of a slice; .* example, 2\*v5e:2x2\."),
        ("2*v5e:2x4x2", r"write, for example, 2\*v5e:2x8\."),
        ("2*v5f:2x4", r"Did you mean v5"),
        ("v5e:2x4*2", r"The number of slices comes first\..*2\*v5e:2x4\."),
        ("2*local", r"local means .* and is written alone"),
    ],
)
def test_a_wrong_topology_is_reported_with_the_nearest_or_an_example(topology, message):
    with pytest.raises(UserError, match=message):
        chip_of(topology)


@pytest.mark.parametrize("topology", ["v5e:2x4x1", "v5e:16x16", "v4:16x16x16", LOCAL])
def test_the_chip_of_a_valid_topology_is_returned(topology):
    assert chip_of(topology) == topology.partition(":")[0].replace(LOCAL, "")


@pytest.mark.parametrize(
    ("topology", "slices"),
    [("v5e:2x4", 1), ("1*v5e:2x4", 1), ("2*v5e:2x4", 2), ("1024*v5e:2x4", 1024)],
)
def test_several_slices_have_the_same_chip_and_shape(topology, slices):
    assert chip_of(topology) == "v5e"
    assert (slices_of(topology), sides_of(topology)) == (slices, [2, 4])


def test_chips_are_found_by_jaxs_names_of_devices():
    for name, chip in CHIPS.items():
        assert chip_of_device(chip.kind) == name
    assert chip_of_device("cpu") == ""
