"""Splits and slices of splits in tfds's syntax, such as `train[:10%]+test`."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from resnet_jax.errors import UserError, nearest

# The name that tfds reserves for all splits of a data set.
ALL = "all"
# The usual names of splits, in small letters: those that are trained on, and those that
# are evaluated on, the preferred ones first.
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("val", "valid", "validation", "eval", "test", "testing")
# The value of `data.eval_split` for images that are held out of the training split.
HELD_OUT = "held_out"


class SplitError(UserError):
    """A split that does not exist, cannot be read or holds no image."""


class Slice(NamedTuple):
    """The images `start` to `stop` of a split.

    Attributes:
      split: The name of the split.
      start: The index of the first image.
      stop: The index after the last image, more than `start`.
    """

    split: str
    start: int
    stop: int


def is_training(name: str) -> bool:
    """Returns whether a split has a usual name of a training split."""
    return name.casefold() in TRAIN_NAMES


def names_in(text: str) -> set[str]:
    """Returns the names of the splits that a user writes, without their slices.

    The complete text is one of them, since a folder may have any name.
    """
    return {text, *(term.partition("[")[0].strip() for term in text.split("+"))}


def slices_of(
    text: str,
    known: Iterable[str],
    shards_of: Callable[[str], Sequence[int]],
    title: str,
) -> list[Slice]:
    """Parses the splits that a user writes, with the meaning that tfds gives them.

    Args:
      text: A split, a slice of one, or several of these joined by +.
      known: The names of the splits that there are.
      shards_of: A function that returns the numbers of images in the shards of a split.
      title: The name of the data set in messages.

    Returns:
      The slices in the order in which they are written, without the empty ones.

    Raises:
      SplitError: There is no such split, a slice is malformed or lies outside of its
        split, or all slices are empty.
    """
    known = list(known)
    slices, sizes = [], {}
    for term in text.split("+"):
        name, bracket, selector = term.strip().partition("[")
        name = name.strip()
        if name not in (ALL, *known):
            raise SplitError(f"There is no split {name!r}.{nearest(name, known)}")
        names = [name] if name in known else known
        if bracket and name not in known:
            raise SplitError(
                f"The split {text!r} of {title} cannot be read: slices are of single"
                f" splits; write {'+'.join(f'{split}[{selector}' for split in known)}."
            )
        for split in names:
            shards = shards_of(split)
            sizes[split] = sum(shards)
            start, stop = 0, sizes[split]
            if bracket:
                start, stop = _bounds(term, split, selector, shards, title)
            if start < stop:
                slices.append(Slice(split, start, stop))
    if not slices:
        counts = ", ".join(f"{name} has {size:,}" for name, size in sizes.items())
        raise SplitError(
            f"The split {text!r} of {title} holds no image ({counts} in all); take a"
            f" larger slice, or the whole split with {'+'.join(sizes)}."
        )
    return slices


def _bounds(
    term: str, split: str, selector: str, shards: Sequence[int], title: str
) -> tuple[int, int]:
    """Returns the start and stop of a slice `[selector` of a split."""
    # Imported here: users and workers of whole splits need not pay for it.
    from tensorflow_datasets.core import ReadInstruction, SplitInfo

    size = sum(shards)
    # tfds's parser gets another name, since a folder may have any name.
    info = SplitInfo(name="split", shard_lengths=list(shards), num_bytes=0)
    try:
        instruction = ReadInstruction.from_spec(f"split[{selector}")
    except ValueError:
        raise SplitError(
            f"The split {term.strip()!r} of {title} cannot be read; slices are written"
            f" as in {split}[:10%], {split}[100:200] or {split}[-5%:], with"
            " percentages from -100% to 100%."
        ) from None
    try:
        (absolute,) = instruction.to_absolute({"split": info})
    except ValueError:
        raise SplitError(
            f"The split {term.strip()!r} of {title} lies outside of {split}, which has"
            f" {size:,} images; its bounds can be from {-size:,} to {size:,}."
        ) from None
    start, stop = absolute.from_, absolute.to
    if start is None:
        # The last 1 % of 30 images would be all of them, as -0.3 is rounded to 0.
        start = size if (instruction.from_ or 0) < 0 else 0
    return start, size if stop is None else stop
