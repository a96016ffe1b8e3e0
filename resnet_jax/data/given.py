"""Data that a caller hands to `train`: arrays, or a source of the caller's own."""

import copy
import dataclasses
import functools
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from resnet_jax.data.cache import MemorySource
from resnet_jax.data.decode import Picture
from resnet_jax.data.sources import GIVEN, NamedSource, Source, Subset, checksum
from resnet_jax.errors import UserError

# First word of the key of the random generator, and one image of how many is held out.
HOLD_OUT, PART = 4, 5
# Labels of a source that its checksum looks at, since reading all might take long.
SAMPLE = 64

Arrays = tuple[Any, Any]


def open_given(data: Any, eval_data: Any | None, seed: int) -> dict[str, NamedSource]:
    """Returns `train` and `test`, the splits of given data.

    Args:
      data: The training split: images and labels, or a source; anything else raises.
      eval_data: The evaluation split; None holds a fifth of `data` out of training,
        chosen by the seed.
      seed: The run's seed.

    Raises:
      UserError: They are not images and labels.
    """
    train = _open(data, "data")
    if eval_data is not None:
        return {"train": train, "test": _open(eval_data, "eval_data")}
    if len(train) < PART:
        raise UserError(
            f"data has {len(train)} images, too few to hold some out of training; give"
            " eval_data."
        )
    order = np.random.default_rng([HOLD_OUT, seed]).permutation(len(train))
    held_out, rest = np.split(order, [len(train) // PART])
    return {
        "train": Subset(train, np.sort(rest), "data, four fifths"),
        "test": Subset(train, np.sort(held_out), "data, the fifth that is held out"),
    }


def config_of_given(config: ConfigDict) -> ConfigDict:
    """Returns the config of a run whose data are given, not opened by their names."""
    config = copy.deepcopy(config)
    config.data.source, config.data.eval_source = GIVEN, ""
    config.data.train_split, config.data.eval_split = "train", "validation"
    if config.data.num_workers < 0:
        # A caller's source need not be one that other processes can open.
        config.data.num_workers = 0
    return config


def _open(data: Any, name: str) -> NamedSource:
    if isinstance(data, Source):
        return _open_source(data, name)
    if isinstance(data, tuple | list) and len(data) == 2:
        return _open_arrays(*data, name)
    raise UserError(
        f"{name} is {_kind(data)}. Give (images, labels), or a source with __len__,"
        " __getitem__ and classes."
    )


def _open_arrays(images: Any, labels: Any, name: str) -> MemorySource:
    images, labels = _check_images(images, name), np.asarray(labels)
    if labels.shape == (len(labels), 1):
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iubUO":
        raise UserError(
            f"The labels of {name} are {labels.dtype}{list(labels.shape)}. Give one"
            " integer or name for each image, such as onehot.argmax(axis=1)."
        )
    if not 0 < len(labels) == len(images):
        raise UserError(
            f"{name} has {len(images)} images and {len(labels)} labels. Give one label"
            " for each image, and at least one image."
        )
    if labels.dtype.kind in "UO":
        classes, labels = np.unique(labels.astype(str), return_inverse=True)
    elif labels.min() < 0:
        index = int(labels.argmin())
        raise UserError(f"Label {index} of {name} is {labels[index]}. Count from 0.")
    else:
        classes = range(int(labels.max()) + 1)
    classes = tuple(map(str, classes))
    return MemorySource(images, labels.astype(np.int32), classes, where=name)


def _check_images(images: Any, name: str) -> np.ndarray | list:
    """Returns uint8 pixels [n, h, w, c], or a list of image files and pixels."""
    if isinstance(images, list | tuple):
        return [pixels_of(image, f"{name}/{i}") for i, image in enumerate(images)]
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype != np.uint8:
        raise UserError(
            f"The images of {name} are {images.dtype}{list(images.shape)}. Give pixels"
            " from 0 to 255 as uint8[n, h, w, c] or uint8[n, h, w]; those from 0 to 1"
            " become such by (255 * images).round().astype('uint8')."
        )
    return images


def pixels_of(image: Any, name: str) -> bytes | np.ndarray:
    """Returns an image as `Picture` takes it: an image file, or uint8 pixels [h, w, c].

    Args:
      image: The bytes of an image file, uint8 pixels [h, w, c] or [h, w], or an image
        of Pillow's.
      name: The image's name in a message.

    Raises:
      UserError: It is anything else.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image):
        return Picture(
            image, 1 if image.mode in ("1", "L", "I;16") else 3, name
        ).pixels()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if image.ndim == 2:
            image = image[..., None]
        if image.ndim == 3 and image.shape[-1] in (1, 3, 4):
            return image
    raise UserError(
        f"{name} is {_kind(image)}. Give the bytes of an image file, uint8 pixels [h,"
        " w, c] or [h, w], or an image of Pillow's."
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class OwnSource:
    """A caller's own source, with what a run needs besides.

    Attributes:
      source: The caller's source.
      where: The name of the split in a message.
    """

    source: Source
    where: str

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(str, self.source.classes))

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[bytes | np.ndarray, int]:
        image, label = self.source[index]
        if not _is_label(label) or not 0 <= label < len(self.classes):
            raise UserError(
                f"The label of {self.name(index)} is {label!r}. Give an integer from 0"
                f" to {len(self.classes) - 1}, the index of one of the classes."
            )
        return pixels_of(image, self.name(index)), int(label)

    def name(self, index: int) -> str:
        return f"{self.where}/{index}"

    def digest(self) -> str:
        places = np.linspace(0, len(self) - 1, SAMPLE).astype(int)
        labels = [self[index][1] for index in np.unique(places).tolist()]
        return checksum(self.where, self.classes, len(self), labels)


def _open_source(source: Source, name: str) -> OwnSource:
    opened = OwnSource(source, name)
    if isinstance(source.classes, str) or not opened.classes:
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
