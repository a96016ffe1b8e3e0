"""Tests of the paddings of convolutions, and of the lengths of their outputs."""

import pytest

from resnet_jax.kernels.geometry import same_padding, symmetric_padding


@pytest.mark.parametrize(
    ("length", "kernel", "stride", "dilation", "symmetric", "same"),
    [
        (224, 7, 2, 1, (3, 3), (2, 3)),
        (225, 7, 2, 1, (3, 3), (3, 3)),
        (56, 3, 2, 1, (1, 1), (0, 1)),
        (57, 3, 2, 1, (1, 1), (1, 1)),
        (56, 3, 1, 2, (2, 2), (2, 2)),
        (56, 1, 2, 1, (0, 0), (0, 0)),
    ],
)
def test_torch_pads_both_sides_alike_and_tensorflow_by_the_size(
    length, kernel, stride, dilation, symmetric, same
):
    for pad, expected in ((symmetric_padding, symmetric), (same_padding, same)):
        geometry = pad(length, length + 1, kernel, stride, dilation)
        assert geometry.padding[0] == expected
        assert geometry.output_length(length, 0, kernel) == -(-length // stride)
