"""`model.bn_group_size` becomes a number of examples, or is rejected with advice."""

import pytest

from resnet_jax.errors import UserError
from resnet_jax.training.ghost_batch import ghost_batch_size
from tests.helpers import tiny


@pytest.mark.parametrize(
    ("chosen", "microbatches", "size"),
    [
        (32, 1, 32),
        (1, 1, 1),
        (256, 1, 256),
        (32, 4, 32),
        ("global", 1, 256),
        ("global", 4, 64),
        ("device", 1, 32),
        ("device", 4, 8),
    ],
)
def test_a_size_is_given_as_a_number_or_a_name(chosen, microbatches, size):
    got = ghost_batch_size(chosen, batch_size=256, microbatches=microbatches, devices=8)
    assert got == size


@pytest.mark.parametrize(
    ("chosen", "batch_size", "microbatches", "message"),
    [
        (30, 256, 1, r"=30 .* the batch of 256; .* does: 16 or 32\."),
        (512, 256, 1, r"=512 .* the batch of 256; .* does: 256\."),
        (0, 256, 1, r"=0 .* does: 1\."),
        (-4, 256, 1, r"=-4 .* does: 1\."),
        (96, 384, 3, r"=96 .* a microbatch of 128 \(384 / 3\); .*: 64 or 128\."),
        # Legal for the batch, but larger than a microbatch.
        (128, 256, 4, r"=128 .* a microbatch of 64 \(256 / 4\); .* does: 64\."),
    ],
)
def test_an_illegal_size_is_rejected_with_the_nearest_legal_ones(
    chosen, batch_size, microbatches, message
):
    with pytest.raises(UserError, match="model.bn_group_size" + message):
        ghost_batch_size(
            chosen, batch_size=batch_size, microbatches=microbatches, devices=8
        )


@pytest.mark.parametrize(
    ("microbatches", "nearest"),
    # 256 images on 8 devices: 32 a device, so any divisor of 32 will do.
    [(-1, "1"), (0, "1"), (3, "2 or 4"), (24, "16 or 32"), (64, "32"), (999, "32")],
)
def test_microbatches_that_devices_cannot_share_are_rejected_with_the_nearest(
    microbatches, nearest
):
    match = rf"optim\.microbatches={microbatches} .*256 .*8 devices.* with {nearest}\."
    with pytest.raises(UserError, match=match):
        ghost_batch_size(32, batch_size=256, microbatches=microbatches, devices=8)


# Three TPU slices of four devices, with four images each. libtpu 0.0.52 was seen
# to abort on 3, 12 and 24, which are among the sizes that are rejected here.
SLICED = {"batch_size": 48, "microbatches": 1, "devices": 12, "tpu_slices": 3}


@pytest.mark.parametrize("chosen", [1, 2, 4, 8, 16, 48])
def test_ghost_batches_inside_tpu_slices_or_over_whole_slices_are_legal(chosen):
    assert ghost_batch_size(chosen, **SLICED) == chosen


@pytest.mark.parametrize(
    ("chosen", "nearest"),
    [(3, "2 or 4"), (6, "4 or 8"), (12, "8 or 16"), (24, "16 or 48")],
)
def test_ghost_batches_over_parts_of_tpu_slices_are_rejected(chosen, nearest):
    match = rf"model\.bn_group_size={chosen} .* 3 TPU slices of 4 .*: {nearest}\."
    with pytest.raises(UserError, match=match):
        ghost_batch_size(chosen, **SLICED)
    # GPUs and single slices have no such limit.
    assert ghost_batch_size(chosen, **SLICED | {"tpu_slices": 1}) == chosen


@pytest.mark.parametrize(("chosen", "size"), [(4, 4), ("global", 8), ("device", 1)])
def test_the_model_of_an_experiment_has_a_number(chosen, size):
    changes = {"model.bn_group_size": chosen, "optim.microbatches": 2}
    assert tiny.setup(changes).model.bn_group_size == size
