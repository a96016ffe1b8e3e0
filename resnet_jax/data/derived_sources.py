"""Sources made of other sources: subsets, new label numbers, combinations by weight."""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import logging
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from resnet_jax.data.source_protocol import NamedSource, checksum
from resnet_jax.errors import UserError

log = logging.getLogger(__name__)

# First word of the seed of the generator that chooses few-shot subsets.
SHOTS = 3
# The number of images from which on reading their labels takes so long that it is said.
MANY = 50_000


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """Some examples of a source.

    Attributes:
      source: The source of the examples.
      indices: The indices of the examples in the source.
      title: The name of the subset in messages and summaries.
    """

    source: NamedSource
    indices: Int[np.ndarray, " n"]
    title: str

    def __post_init__(self):
        if not len(self.indices):
            raise UserError(f"{self.title} holds no image.")

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of the source."""
        return self.source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        return self.source[int(self.indices[index])]

    def name(self, index: int) -> str:
        """Returns the name that the example has in the source."""
        return self.source.name(int(self.indices[index]))

    def digest(self) -> str:
        """Returns a checksum of the source and the indices."""
        return checksum(self.source.digest(), self.indices.tolist())


@dataclasses.dataclass(frozen=True, eq=False)
class Balanced(Subset):
    """All examples of a source, whose classes training draws equally often.

    As a sequence it holds each example once, ordered by class. Training interleaves the
    classes at random, as it does with sources (see `Combined`); an epoch has as many
    images as the source. This is class-balanced sampling (Kang et al. 2020,
    arXiv:1910.09217, section 3.2), without repeating an image of a class before all of
    its images have come.

    Attributes:
      sizes: The number of images of each class that occurs.
    """

    sizes: tuple[int, ...]

    def digest(self) -> str:
        """Returns the checksum of the source, since it has the same images."""
        return self.source.digest()


@dataclasses.dataclass(frozen=True, eq=False)
class Relabelled:
    """A source whose classes have other numbers.

    Attributes:
      source: The source of the examples.
      classes: The names of the classes, in the order of the new labels.
      new_labels: The new label of each label of the source.
    """

    source: NamedSource
    classes: tuple[str, ...]
    new_labels: tuple[int, ...]

    @property
    def title(self) -> str:
        """The title of the source."""
        return self.source.title

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int | np.ndarray]:
        image, label = self.source[index]
        if isinstance(label, int):
            return image, self.new_labels[label]
        # The last entry maps -1, the padding after an image's labels, to itself.
        return image, np.array([*self.new_labels, -1])[label]

    def name(self, index: int) -> str:
        """Returns the name that the example has in the source."""
        return self.source.name(index)

    def digest(self) -> str:
        """Returns a checksum of the source and the new labels."""
        return checksum(self.source.digest(), self.new_labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Combined:
    """Several sources of the same classes, combined by weight.

    As a sequence it holds each example of each source once, whatever the weights.
    Training interleaves the sources at random, in proportion to their weights (see
    `loader.epoch_order`). An epoch has as many images as all sources together.

    Attributes:
      parts: The sources.
      weights: The weight of each source, above 0.
    """

    parts: tuple[NamedSource, ...]
    weights: tuple[float, ...]

    def __post_init__(self):
        for part, weight, share in zip(
            self.parts, self.weights, self.shares, strict=True
        ):
            if not share:
                raise UserError(
                    f"The weight {weight:g} of {part.title} leaves it no image of an"
                    f" epoch of {len(self)}; weights are above 0 and of similar size."
                )

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes, which all sources share."""
        return self.parts[0].classes

    @property
    def title(self) -> str:
        """The titles of the sources, with their weights where these matter."""
        if self.shares == self.sizes:
            return " + ".join(part.title for part in self.parts)
        pairs = zip(self.weights, self.parts, strict=True)
        return " + ".join(f"{weight:g} x {part.title}" for weight, part in pairs)

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The number of images of each source."""
        return tuple(map(len, self.parts))

    @functools.cached_property
    def shares(self) -> tuple[int, ...]:
        """The number of images that an epoch takes from each source."""
        fractions = np.cumsum(self.weights) / np.sum(self.weights)
        bounds = np.rint(fractions * sum(self.sizes)).astype(int).tolist()
        return tuple(b - a for a, b in itertools.pairwise([0, *bounds]))

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        part, own_index = self.find(index)
        return part[own_index]

    def name(self, index: int) -> str:
        """Returns the name that the example has in its source."""
        part, own_index = self.find(index)
        return part.name(own_index)

    def digest(self) -> str:
        """Returns a checksum of the sources and of their shares of an epoch."""
        return checksum([part.digest() for part in self.parts], self.shares)

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.sizes)]

    def find(self, index: int) -> tuple[NamedSource, int]:
        """Returns the source of an example, and its index in that source."""
        number = bisect.bisect_right(self._starts, index) - 1
        return self.parts[number], index - self._starts[number]


def label_of(source: NamedSource, index: int) -> int | np.ndarray:
    """Returns the label of an example, without reading its image where possible."""
    if isinstance(source, Subset):
        return label_of(source.source, int(source.indices[index]))
    if isinstance(source, Combined):
        return label_of(*source.find(index))
    labels = getattr(source, "labels", None)
    return source[index][1] if labels is None else int(labels[index])


def labels_of(source: NamedSource) -> Int[np.ndarray, " n"]:
    """Returns the labels of all examples, without reading images where possible.

    Args:
      source: A source whose examples have one label each.
    """
    labels = known_labels(source)
    if labels is not None:
        return labels
    if len(source) >= MANY:
        log.warning(
            "Reading the labels of the %s images of %s.",
            *(f"{len(source):,}", source.title),
        )
    return np.array([label_of(source, i) for i in range(len(source))], np.int64)


def known_labels(source: NamedSource) -> Int[np.ndarray, " n"] | None:
    """Returns the labels of all examples, or None if images would have to be read.

    Args:
      source: A source whose examples have one label each.
    """
    if isinstance(source, Subset):
        labels = known_labels(source.source)
        return None if labels is None else labels[source.indices]
    if isinstance(source, Combined):
        parts = [known_labels(part) for part in source.parts]
        known = [labels for labels in parts if labels is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    if isinstance(source, Relabelled):
        labels = known_labels(source.source)
        return None if labels is None else np.array(source.new_labels)[labels]
    stored: Sequence[int] | np.ndarray = getattr(source, "labels", ())
    return np.array(stored, np.int64) if len(stored) else None


def balanced(source: NamedSource) -> Balanced:
    """Returns the source, of whose classes training draws each equally often.

    Raises:
      UserError: The source is a combination by weight.
    """
    if isinstance(source, Combined) and source.shares != source.sizes:
        raise UserError(
            f"data.balance=True draws each class equally often, but {source.title} has"
            " weights; leave out one of them."
        )
    labels = labels_of(source)
    order = np.argsort(labels, kind="stable")
    sizes = tuple(size for size in np.bincount(labels).tolist() if size)
    return Balanced(source, order, f"{source.title}, balanced", sizes)


def hold_out(
    source: NamedSource, fraction: float, seed: int
) -> tuple[NamedSource, NamedSource]:
    """Splits a source into images to train on and images to evaluate on.

    The same fraction of each class is held out, but at least one image and not all of
    them. The choice depends on the seed and on the images' names, so most images stay
    where they are when others are added. An image that occurs several times, as in
    `train+train`, is in one part, and evaluated once.

    Args:
      source: The source.
      fraction: The fraction that is held out, above 0 and below 1.
      seed: The seed of the choice.

    Returns:
      The source without these images, and these images.

    Raises:
      UserError: A class has one image, or the source is a combination by weight.
    """
    if isinstance(source, Combined) and source.shares != source.sizes:
        raise UserError(
            f"No images of {source.title} can be held out, since its parts have"
            " weights; name the images to evaluate on with data.eval_source=SOURCE."
        )
    labels = labels_of(source)
    names = [source.name(index) for index in range(len(source))]
    first: dict[str, int] = {}
    keys = np.array(
        [
            _random_key(seed, text) if first.setdefault(name, index) == index else 2
            for index, (name, text) in enumerate(
                zip(names, _lasting_names(source), strict=True)
            )
        ]
    )
    # By class, and in random order in each.
    order = np.lexsort((keys, labels))
    order = order[keys[order] < 2]
    held_out: list[int] = []
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        size = len(members)
        if size == 1:
            raise UserError(
                f"Class {source.classes[labels[members[0]]]!r} of {source.title} has"
                " only one image, so none can be held out for evaluation; add an image,"
                " remove the class, or name the images to evaluate on with"
                " data.eval_source=SOURCE or data.eval_split=SPLIT."
            )
        chosen = min(max(round(size * fraction), 1), size - 1)
        held_out += members[:chosen].tolist()
    chosen_names = {names[index] for index in held_out}
    kept = [index for index, name in enumerate(names) if name not in chosen_names]
    return (
        Subset(source, np.array(kept), f"{source.title} (not held out)"),
        Subset(source, np.array(sorted(held_out)), f"{source.title} (held out)"),
    )


def _lasting_names(source: NamedSource) -> list[str]:
    """Returns a text for each example that stays the same if the data are moved."""
    if isinstance(source, Subset):
        names = _lasting_names(source.source)
        return [names[index] for index in source.indices.tolist()]
    if isinstance(source, Combined):
        return [name for part in source.parts for name in _lasting_names(part)]
    if isinstance(source, Relabelled):
        return _lasting_names(source.source)
    paths = getattr(source, "paths", None)
    return [str(i) for i in range(len(source))] if paths is None else list(paths)


def _random_key(seed: int, text: str) -> float:
    """Returns a number from 0 to 1 that is a function of a seed and a text."""
    content = f"{seed}/{text}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(content).digest()[:6]) / 2**48


class Turns(NamedTuple):
    """The way in which an epoch interleaves sources, or the classes of one.

    Attributes:
      sizes: The number of images of each source; one, unless sources are combined.
      shares: The number of images that `divisor` epochs take from each source.
      divisor: The number of epochs after which these shares are exact.
    """

    sizes: tuple[int, ...]
    shares: tuple[int, ...]
    divisor: int = 1


def turns_of(source: NamedSource) -> Turns:
    """Returns how an epoch interleaves combined sources, or the classes of one.

    There is one entry, the number of images, for any other source.
    """
    # A combination that `cache.cached` holds in memory is still interleaved by weight.
    source = getattr(source, "origin", None) or source
    if isinstance(source, Combined):
        return Turns(source.sizes, source.shares)
    if isinstance(source, Balanced):
        classes = len(source.sizes)
        return Turns(source.sizes, (len(source),) * classes, classes)
    return Turns((len(source),), (len(source),))


def check_same_classes(train: NamedSource, evaluation: NamedSource) -> None:
    """Checks that two splits number the same classes in the same way.

    Args:
      train: The training split.
      evaluation: The eval split.

    Raises:
      UserError: One of them has a class that the other one lacks.
    """
    for richer, poorer in ((train, evaluation), (evaluation, train)):
        missing = sorted(set(richer.classes) - set(poorer.classes))
        if missing:
            place = _place(richer, richer.classes.index(missing[0]))
            raise UserError(
                f"Class {missing[0]!r} is in {richer.title}{place} but not in"
                f" {poorer.title}{_twin(missing[0], poorer.classes)}, so labels would"
                " differ; add it to both splits, or remove it from both before a run"
                " begins."
            )


def _place(source: NamedSource, label: int) -> str:
    """Returns the first line of a table that has a label; '' for other sources."""
    while isinstance(source, Subset | Relabelled):
        source = source.source
    lines = getattr(source, "lines", None)
    return f" (line {lines[labels_of(source).tolist().index(label)]})" if lines else ""


def _twin(name: str, classes: Sequence[str]) -> str:
    """Returns a clause on a class whose name looks like another; '' without one."""

    def plain(text: str) -> str:
        return unicodedata.normalize("NFKC", text).casefold().strip()

    for other in classes:
        if plain(other) == plain(name):
            return f" (but {other!a}, which is not the same text as {name!a})"
    return ""


def with_classes(source: NamedSource, classes: Sequence[str]) -> NamedSource:
    """Returns the source with labels that number the given classes, matched by name.

    Args:
      source: The source, which may have some of the classes in any order.
      classes: The names of the classes, in the order of the new labels.

    Raises:
      UserError: A class of the source is not one of them; the message names it.
    """
    classes = tuple(classes)
    if source.classes == classes:
        return source
    number = {name: label for label, name in enumerate(classes)}
    for label, name in enumerate(source.classes):
        if name not in number:
            raise UserError(
                f"Class {label} of {source.title}{_place(source, label)} is {name!r},"
                f" which is not one of the {len(classes)} classes of the network"
                f" ({', '.join(classes[:3])}, ...){_twin(name, classes)}, so labels"
                " cannot be compared; choose a data set with the same class names."
            )
    return Relabelled(source, classes, tuple(number[name] for name in source.classes))


def few_shot(source: NamedSource, shots: int, seed: int) -> Subset:
    """Returns `shots` random images of each class.

    They are chosen from all images together if splits or sources are combined: of a
    combination by weight, in proportion to the weights. An image that occurs several
    times, as in `train+train`, is chosen once.

    Args:
      source: The training split.
      shots: The number of images of each class.
      seed: The seed of the choice.

    Raises:
      UserError: A class has fewer images.
    """
    missing = np.full(len(source.classes), shots)
    chosen: dict[str, int] = {}
    # Reads examples in random order until all classes are full: few of a large set.
    for index in _random_order(source, np.random.default_rng([SHOTS, seed])):
        label, name = label_of(source, index), source.name(index)
        if missing[label] and name not in chosen:
            missing[label] -= 1
            chosen[name] = index
        if not missing.any():
            indices = np.array(list(chosen.values()))
            return Subset(source, indices, f"{source.title}, {shots} a class")
    poor = np.flatnonzero(missing)
    examples = ", ".join(
        f"{shots - missing[label]} of class {source.classes[label]!r}"
        for label in poor[:3]
    )
    more = f" and too few of {len(poor) - 3} other classes" if len(poor) > 3 else ""
    raise UserError(
        f"data.shots={shots}, but {source.title} has only {examples}{more}; lower"
        " data.shots, or add a split or images."
    )


def _random_order(source: NamedSource, rng: np.random.Generator) -> list[int]:
    """Returns the indices of a source in random order, the heavier sources earlier."""
    sizes, shares, _ = turns_of(source)
    if sizes == shares:
        return rng.permutation(len(source)).tolist()
    # The times until the first events of independent processes with these rates.
    rates = np.repeat(np.divide(shares, sizes), sizes)
    return np.argsort(rng.exponential(size=len(source)) / rates).tolist()
