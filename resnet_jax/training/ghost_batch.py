"""Resolves `config.model.bn_group_size` to a number of examples, once for a run."""

import math

from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax.errors import UserError, nearest_numbers
from resnet_jax.parallel import sharding


def resolve(config: ConfigDict, mesh: Mesh) -> int:
    """Returns the ghost batch size of a run, in examples.

    Args:
      config: The run's config.
      mesh: The devices of the run.

    Raises:
      UserError: The size does not suit the batch or the devices; see
        `ghost_batch_size`.
    """
    on_tpu = sharding.platform_of(mesh) == "tpu"
    return ghost_batch_size(
        config.model.bn_group_size,
        batch_size=config.batch_size,
        microbatches=config.optim.microbatches,
        devices=mesh.size,
        tpu_slices=sharding.slice_count(mesh) if on_tpu else 1,
    )


def ghost_batch_size(
    chosen: int | str,
    *,
    batch_size: int,
    microbatches: int,
    devices: int,
    tpu_slices: int = 1,
) -> int:
    """Returns the ghost batch size in examples.

    Args:
      chosen: A number of examples, `global` (all examples of a microbatch) or `device`
        (the examples of a microbatch that one device holds).
      batch_size: Images per step over all devices.
      microbatches: Number of microbatches of a step.
      devices: Number of devices.
      tpu_slices: Number of TPU slices that the devices form. libtpu (0.0.52) can abort
        where statistics are summed over parts of slices.

    Raises:
      UserError: The size does not divide the microbatch, or ghost batches would spread
        over parts of TPU slices; the message names the nearest legal sizes.
    """
    legal = [m for m in _divisors(batch_size) if (batch_size // m) % devices == 0]
    if microbatches not in legal:
        raise UserError(
            f"optim.microbatches={microbatches} does not cut a batch of {batch_size}"
            f" into equal parts for {devices} devices; use fewer devices, or start a"
            f" run with {nearest_numbers(microbatches, legal)}."
        )
    microbatch = batch_size // microbatches
    if isinstance(chosen, str):
        return {"global": microbatch, "device": microbatch // devices}[chosen]
    if chosen < 1 or microbatch % chosen:
        title = f"the batch of {batch_size}"
        if microbatches > 1:
            title = f"a microbatch of {microbatch} ({batch_size} / {microbatches})"
        raise UserError(
            f"model.bn_group_size={chosen} does not divide {title}; the nearest that"
            f" does: {nearest_numbers(chosen, _divisors(microbatch))}."
        )

    def aligns_with_slices(size: int) -> bool:
        # XLA shards the ghost batches over as many devices as divide their number, and
        # sums the statistics of each ghost batch over `spread` devices.
        spread = devices // math.gcd(devices, microbatch // size)
        slice_size = devices // tpu_slices
        return max(spread, slice_size) % min(spread, slice_size) == 0

    if not aligns_with_slices(chosen):
        aligned = [size for size in _divisors(microbatch) if aligns_with_slices(size)]
        raise UserError(
            f"model.bn_group_size={chosen} would spread ghost batches over parts of the"
            f" {tpu_slices} TPU slices of {devices // tpu_slices} devices each, which"
            " libtpu can fail to compile; the nearest size that does not:"
            f" {nearest_numbers(chosen, aligned)}."
        )
    return chosen


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
