"""Searches the largest batch that fits."""

import math
from collections.abc import Callable

from resnet_jax.console import output
from resnet_jax.errors import UserError

# The answer is within this part of the largest batch, but for what sizes are legal.
PRECISION = 1 / 16
MOST_TRIES = 12


def unit_of(groups: int, devices: int, chips: int, microbatches: int) -> int:
    """The least images a chip of which all multiples are legal.

    Args:
      groups: images of a batch-norm group; 1 where any number is legal.
      devices, chips: of the topology.
      microbatches: of a batch.
    """
    batch = math.lcm(groups, devices) * microbatches
    return batch // math.gcd(batch, chips)


def largest(
    wanted: Callable[[int], tuple[int, int]], start: int, unit: int
) -> tuple[int, int]:
    """The largest multiple of `unit` that fits, and the least that was seen not to.

    Args:
      wanted: bytes that a number of images a chip wants, and that there are.
      start: where to begin.
      unit: of the numbers.

    Returns:
      Both numbers; 0 for the first if not even one unit fits, and for the second if
      none of the tries was too large. Memory is taken to grow with the images along a
      line through the last two tries.

    Raises:
      UserError: the config refuses the first try; later ones end the search.
    """
    fits, fails = 0, math.inf
    tries: list[tuple[int, int]] = []
    number = max(start // unit, 1) * unit
    for _ in range(MOST_TRIES):
        try:
            need, limit = wanted(number)
        except UserError as error:
            if not fits:
                raise
            output.note(f"no larger batch was tried: {error}")
            break
        tries.append((number, need))
        if need <= limit:
            fits = max(fits, number)
        else:
            fails = min(fails, number)
        step = max(round(fits * PRECISION / unit), 1) * unit
        if fails - fits <= step:
            break
        guess = _guess(tries, limit, fits, fails) // unit * unit
        number = int(min(max(guess, fits + step), fails - step))
    return fits, int(fails) if fails < math.inf else 0


def _guess(tries: list, limit: int, fits: int, fails: float | int) -> float | int:
    """The number that would just fit, by a line through the last two tries."""
    (one, its), (other, others) = tries[-1], tries[-2] if len(tries) > 1 else (0, 0)
    slope = (its - others) / (one - other)
    # What looks small may be no part of the images, so at most eight times as many.
    most = 8 * one if fails == math.inf else fails
    if slope <= 0:
        return most if its <= limit else (fits + most) / 2
    return min(one + (limit - its) / slope, most)
