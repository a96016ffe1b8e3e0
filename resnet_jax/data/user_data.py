"""Data that a user passes to `train`: arrays, or a source of the user's own."""

import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from resnet_jax.data.decode import Picture
from resnet_jax.data.derived_sources import Subset
from resnet_jax.data.memory_source import MemorySource
from resnet_jax.data.source_protocol import NamedSource, Source, checksum
from resnet_jax.data.sources import GIVEN
from resnet_jax.data.user_images import check_pixels, parts_of
from resnet_jax.errors import UserError

log = logging.getLogger(__name__)

# The first word of the seed of the generator that chooses the held-out images.
HOLD_OUT = 4
# Labels from this number on are names of another kind, and not numbers of classes.
MOST_CLASSES = 1_000_000
# The number of labels that a source's checksum includes; reading all might take long.
SAMPLE = 64

Arrays = tuple[Any, Any]


def open_given(
    data: Any, eval_data: Any | None, config: ConfigDict
) -> dict[str, NamedSource]:
    """Opens the data that a user passed to `train`.

    Args:
      data: The training split: a pair of images and labels, or a `Source`.
      eval_data: The eval split in the same forms; None takes the fraction
        `config.data.eval_fraction` of `data`, which is chosen by `config.seed` and held
        out of training.
      config: The run's config.

    Returns:
      The splits `train` and `test`.

    Raises:
      UserError: The data are not images and labels; the message says what to pass.
    """
    channels = config.data.channels
    train = _open(data, channels, "data")
    if eval_data is not None:
        return {"train": train, "test": _open(eval_data, channels, "eval_data")}
    # The fraction that its author meant: in floating-point numbers 0.29 of 100 is 28.
    size = math.floor(len(train) * Fraction(str(config.data.eval_fraction)))
    if not size:
        raise UserError(
            f"data has {len(train)} images, too few to hold some out of training; give"
            " eval_data."
        )
    order = np.random.default_rng([HOLD_OUT, config.seed]).permutation(len(train))
    held_out, training = np.split(order, [size])
    return {
        "train": Subset(train, np.sort(training), "data (not held out)"),
        "test": Subset(train, np.sort(held_out), "data (held out)"),
    }


def config_of_given(config: ConfigDict) -> ConfigDict:
    """Returns the config of a run whose data are passed to `train`.

    Args:
      config: The user's config, whose keys on sources and splits are replaced in a
        copy.
    """
    config = copy.deepcopy(config)
    for key in ("train_split", "eval_split"):
        if set(config.data[key]) & set("[+"):
            log.warning(
                "config.data.%s=%r has no effect, since the images are those that were"
                " passed to train; pass a part of them.",
                *(key, config.data[key]),
            )
    config.data.source, config.data.eval_source = GIVEN, ""
    config.data.train_split, config.data.eval_split = "train", "validation"
    if config.data.num_workers < 0:
        # A user's source need not be one that can be pickled for other processes.
        config.data.num_workers = 0
    return config


def _open(data: Any, channels: int, name: str) -> NamedSource:
    if isinstance(data, Source):
        return _open_source(data, channels, name)
    if isinstance(data, tuple | list) and len(data) == 2:
        images, labels = data
        return _open_arrays(images, labels, channels, name)
    raise UserError(
        f"{name} is {_kind(data)}. Give (images, labels), which zip(*pairs) makes of"
        " pairs, or a source with __len__, __getitem__ and classes."
    )


def _open_arrays(images: Any, labels: Any, channels: int, name: str) -> MemorySource:
    images, labels = _check_images(images, channels, name), np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    are_names = all(isinstance(label, str) for label in labels.flat)
    if labels.ndim != 1 or not (are_names or labels.dtype.kind in "iub"):
        raise UserError(
            f"The labels of {name} are {labels.dtype}{list(labels.shape)}. Give one"
            " integer or name for each image: labels.astype(int) of whole numbers,"
            " labels.argmax(axis=1) of one-hot rows."
        )
    if not 0 < len(labels) == len(images):
        raise UserError(
            f"{name} has {len(images)} images and {len(labels)} labels. Give one label"
            " for each image, and at least one image."
        )
    if are_names:
        names, labels = np.unique(labels.astype(str), return_inverse=True)
        classes = tuple(map(str, names))
    elif labels.min() < 0:
        index = int(labels.argmin())
        raise UserError(f"Label {index} of {name} is {labels[index]}. Count from 0.")
    elif labels.max() >= MOST_CLASSES:
        index = int(labels.argmax())
        raise UserError(
            f"Label {index} of {name} is {labels[index]}. Number the classes from 0,"
            " such as with numpy.unique(labels, return_inverse=True)."
        )
    else:
        classes = tuple(map(str, range(int(labels.max()) + 1)))
        if empty := sorted(set(range(len(classes))) - set(labels.tolist())):
            numbers = ", ".join(map(str, empty[:5])) + (", ..." if empty[5:] else "")
            log.warning(
                "%d of the %d classes of %s have no image (%s); labels count from 0.",
                *(len(empty), len(classes), name, numbers),
            )
    return MemorySource(images, labels.astype(np.int32), classes, title=name)


def _check_images(images: Any, channels: int, name: str) -> np.ndarray | list:
    """Returns uint8 pixels [n, h, w, c], or a list of files and pixels [h, w, c].

    Raises a UserError if they are not images.
    """
    if isinstance(images, list | tuple):
        return [
            _pixels_of(image, channels, f"{name}/{i}") for i, image in enumerate(images)
        ]
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4:
        raise UserError(
            f"The images of {name} are {_kind(images)}. Give uint8[n, h, w, c] or"
            " uint8[n, h, w]."
        )
    return check_pixels(images, channels, f"{name}[0]")


def _pixels_of(image: Any, channels: int, name: str) -> bytes | np.ndarray:
    """Returns one image as the bytes of a file or as uint8 pixels [h, w, c].

    Raises a UserError if it is not one image in a form that `parts_of` takes.
    """
    if getattr(image, "ndim", 0) > 3:
        raise UserError(
            f"{name} is {_kind(image)}. Give one image [h, w, c] or [h, w]."
        )
    # With 3 channels, `parts_of` takes an array of three axes for one image.
    (part,) = parts_of(image, 3, name)
    if isinstance(part, Image.Image):
        return Picture(part, channels, name).pixels()
    return part


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class OwnSource:
    """A user's own source, as a `NamedSource` that checks every example.

    Attributes:
      source: The user's source.
      channels: The number of channels that the run takes.
      title: The name of the split in messages and summaries.
    """

    source: Source
    channels: int
    title: str

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return tuple(map(str, self.source.classes))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        try:
            example = self.source[index]
        except Exception as error:
            error.add_note(f"It was raised while {self.name(index)} was read.")
            raise
        if not isinstance(example, tuple | list) or len(example) != 2:
            raise UserError(
                f"{self.name(index)} is {_kind(example)}. Give an image and its label."
            )
        image, label = example
        if not _is_label(label) or not 0 <= label < len(self.classes):
            raise UserError(
                f"The label of {self.name(index)} is {label!r}. Give an integer from 0"
                f" to {len(self.classes) - 1}, the index of one of the classes."
            )
        return _pixels_of(image, self.channels, self.name(index)), int(label)

    def name(self, index: int) -> str:
        """Returns the name of an example in messages."""
        return f"{self.title}/{index}"

    def digest(self) -> str:
        """Returns a checksum of the size, the classes and a sample of the labels."""
        places = np.linspace(0, len(self) - 1, SAMPLE).astype(int)
        labels = [self[index][1] for index in np.unique(places).tolist()]
        return checksum(self.title, self.classes, len(self), labels)


def _open_source(source: Source, channels: int, name: str) -> OwnSource:
    opened = OwnSource(source, channels, name)
    is_sequence = isinstance(source.classes, Sequence) and len(source.classes) > 0
    if isinstance(source.classes, str) or not is_sequence:
        raise UserError(
            f"The classes of {name} are {source.classes!r}. Give a sequence of names."
        )
    if len(set(opened.classes)) < len(opened.classes):
        raise UserError(f"Two classes of {name} have the same name.")
    if not len(opened):
        raise UserError(f"{name} holds no image.")
    return opened


def _is_label(label: Any) -> bool:
    return np.ndim(label) == 0 and np.asarray(label).dtype.kind in "iu"


def _kind(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype}{list(value.shape)}"
    return f"{type(value).__name__}"
