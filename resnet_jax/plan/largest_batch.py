"""Searches for the largest batch that fits into a chip's memory."""

import math
from collections.abc import Callable

from resnet_jax.console import output
from resnet_jax.errors import UserError

# The search ends within this fraction of the largest batch, if legal sizes allow it.
PRECISION = 1 / 16
MOST_TRIES = 12


def unit_of(ghost_batch: int, devices: int, chips: int, microbatches: int) -> int:
    """Returns the smallest number of images per chip whose multiples are all legal.

    Args:
      ghost_batch: Ghost batch size in images; 1 if every number is legal.
      devices: Number of devices of the topology.
      chips: Number of chips of the topology.
      microbatches: Number of microbatches per batch.
    """
    batch = math.lcm(ghost_batch, devices) * microbatches
    return batch // math.gcd(batch, chips)


def largest(
    memory_of: Callable[[int], tuple[int, int]], start: int, unit: int
) -> tuple[int, int]:
    """Searches for the largest multiple of `unit` that fits.

    Each guess assumes that memory grows linearly with the images, along the line
    through the last two tries.

    Args:
      memory_of: A function of a number of images per chip. It returns the bytes of a
        device that these need, and the bytes that a device has.
      start: Number of images per chip to try first.
      unit: Images per chip of which every try is a multiple.

    Returns:
      The largest number that was seen to fit (0 if not even one unit fits), and the
      smallest that was seen not to (0 if no try was too large).

    Raises:
      UserError: The config does not allow the first try. On a later try the error only
        ends the search.
    """
    fits, fails = 0, 0
    tries: list[tuple[int, int]] = []
    number = max(start // unit, 1) * unit
    for _ in range(MOST_TRIES):
        try:
            need, limit = memory_of(number)
        except UserError as error:
            if not fits:
                raise
            output.note(f"The search ends without a larger batch: {error}")
            break
        tries.append((number, need))
        if need <= limit:
            fits = max(fits, number)
        else:
            fails = min(fails or number, number)
        step = max(round(fits * PRECISION / unit), 1) * unit
        if fails and fails - fits <= step:
            break
        number = max(int(_guess(tries, limit, fits, fails) // unit * unit), fits + step)
        if fails:
            number = min(number, fails - step)
    return fits, fails


def _guess(
    tries: list[tuple[int, int]], limit: int, fits: int, fails: int
) -> float | int:
    """Returns the number that would just fit, on the line through the last two tries.

    Args:
      tries: Numbers of images per chip with the bytes that each needs.
      limit: Bytes that a device has.
      fits: The largest number that was seen to fit, or 0.
      fails: The smallest number that was seen not to fit, or 0.
    """
    number, need = tries[-1]
    before, need_before = tries[-2] if len(tries) > 1 else (0, 0)
    slope = (need - need_before) / (number - before)
    # Most of the memory may be fixed, so a guess is at most eight times the last try.
    most = fails or 8 * number
    if slope <= 0:
        return most if need <= limit else (fits + most) / 2
    return min(number + (limit - need) / slope, most)
