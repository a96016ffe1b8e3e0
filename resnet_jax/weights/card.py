"""The card of weights: the network they belong to, and how its input is made."""

import dataclasses
import fnmatch
import functools
import importlib.util
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from resnet_jax.data.augment import Augment
from resnet_jax.data.resize import INTERPOLATIONS
from resnet_jax.data.user_images import Images, pictures_of
from resnet_jax.errors import BadImageError, BadValueError, UserError, nearest
from resnet_jax.models.inputs import normalize
from resnet_jax.models.zoo import ALIASES, Spec, get_entry, get_spec, resolve

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# What most weights of a family were made for; a later row goes before an earlier one.
FAMILIES = {
    "resnest*": {"interpolation": "bilinear"},
    "res2ne[tx]*": {"interpolation": "bilinear"},
    "resnetv2_*": HALF,
    "resnetv2_*_bit": {
        "interpolation": "bilinear",
        "image_size": 448,
        "crop_fraction": 1.0,
    },
    # Caffe's: BGR of 0 to 255, less the mean.
    "keras_*": {
        "bgr": True,
        "mean": tuple(mean / 255 for mean in (103.939, 116.779, 123.68)),
        "std": (1 / 255,) * 3,
    },
    "keras_*v2": HALF | {"bgr": False},
    "tutorial_keras_*": {
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "crop_fraction": 1.0,
    },
    "akamaster_*": IMAGENET,
}


class Prediction(NamedTuple):
    """A class that a network takes an image for.

    Attributes:
      index: The index of the class.
      name: The name of the class, or `class INDEX` if no name is known.
      probability: The probability that the network gives it, from 0 to 1.
    """

    index: int
    name: str
    probability: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """The facts that are needed to use weights.

    Attributes:
      network: The name of the network in the zoo.
      spec: The fields of the network's spec.
      scheme: The naming scheme of the tensors beside which the card lies.
      image_size: The side of the input in pixels.
      mean: The mean of each channel as the network sees it, from 0 to 1.
      std: The standard deviation of each channel, in the same unit.
      interpolation: The name of the resizing filter, as in `data.interpolation`.
      crop_fraction: The part of the resized short side that the central crop keeps.
      bgr: Whether the channels are in the order of OpenCV and Caffe.
      classes: The names of the classes in the order of the logits, as far as known.
      license: The licence of the weights, as SPDX if their source gives it so.
      origin: The place where the weights come from.
      top1: The accuracy in percent that their source gives, or None.
    """

    network: str
    spec: Mapping[str, Any] = dataclasses.field(repr=False)
    scheme: str
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bilinear"
    crop_fraction: float = 0.875
    bgr: bool = False
    classes: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    license: str = ""
    origin: str = ""
    top1: float | None = None

    def __post_init__(self):
        for key, kind in (("mean", float), ("std", float), ("classes", str)):
            value = tuple(kind(part) for part in getattr(self, key))
            object.__setattr__(self, key, value)
        spec = {key: as_tuples(value) for key, value in self.spec.items()}
        object.__setattr__(self, "spec", spec)
        channels, classes = spec["in_channels"], spec["num_classes"]
        if not len(self.mean) == len(self.std) == channels:
            raise BadValueError(
                f"mean and std must have {channels} entries, one per channel."
            )
        if len(self.classes) > classes:
            raise BadValueError(
                f"The card has {len(self.classes)} names for {classes} classes."
            )

    def make_spec(self) -> Spec:
        """Returns the network's spec; raises UserError for fields it cannot have."""
        return get_spec(self.network, **self.spec)

    def for_spec(self, spec: Spec) -> "Card":
        """Returns the card for another number of classes or channels."""
        changes = {"spec": dataclasses.asdict(spec)}
        if spec.num_classes != self.spec["num_classes"]:
            changes |= {"classes": (), "top1": None}
        channels = spec.in_channels
        if channels != len(self.mean):
            for key, values in (("mean", self.mean), ("std", self.std)):
                repeated = values * -(-channels // len(values))
                average = (sum(values) / len(values),)
                changes[key] = average if channels == 1 else repeated[:channels]
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """Returns the card as JSON, one line a field."""
        fields = dataclasses.asdict(self).items()
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in fields)
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def class_name(self, index: int) -> str:
        """Returns the name of a class, or `class INDEX` if no name is known."""
        return self.classes[index] if index < len(self.classes) else f"class {index}"

    def top(
        self, logits: Float[np.ndarray, " classes"], k: int = 5
    ) -> list[Prediction]:
        """Returns the k most probable classes by the logits of one image."""
        logits = logits.astype(np.float64)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")[:k].tolist()
        return [
            Prediction(index, self.class_name(index), float(probabilities[index]))
            for index in order
        ]

    def preprocess(self, images: Images) -> Float32[Array, "n s s c"]:
        """Prepares images as in the evaluation of the weights' training.

        Images are decoded, turned upright as their EXIF data say, resized, cropped
        and normalised. Grey and colour images are converted to what the network takes,
        and transparency is dropped.

        Args:
          images: A path (also of `gs://` or `s3://`), the bytes of an image file, an
            image of Pillow, a uint8 array [h, w], [h, w, c] or [n, h, w, c] of NumPy
            or JAX, or a list of these, which may be mixed.

        Returns:
          The network's input; a single image has n = 1.

        Raises:
          UserError: An image cannot be read, or has another form.

        Example:
          >>> card = resnet_jax.load("runs/quickstart").card
          >>> card.preprocess(["seven.png", np.zeros((20, 30, 3), np.uint8)]).shape
          (2, 8, 8, 1)
        """
        return self.normalize(jnp.asarray(self.crop(images)))

    def crop(self, images: Images) -> UInt8[np.ndarray, "n s s c"]:
        """Returns the pixels that the network sees, before they are normalised.

        The arguments and errors are those of `preprocess`.
        """
        channels = self.spec["in_channels"]
        augment = Augment(
            size=self.image_size,
            crop_fraction=self.crop_fraction,
            interpolation=self.interpolation,
        )
        try:
            pictures = pictures_of(images, channels, self.network)
            pixels = [augment(picture, None) for picture in pictures]
        except BadImageError as error:
            reason = str(error).rstrip(".")
            raise BadImageError(f"{reason}; replace it or leave it out.") from None
        if not pixels:
            return np.zeros((0, *augment.shape, channels), np.uint8)
        return np.stack(pixels)

    def normalize(self, pixels: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Turns cropped pixels into the network's input."""
        if self.bgr:
            pixels = pixels[..., ::-1]
        return normalize(pixels, self.mean, self.std, jnp.float32)


def as_tuples(value):
    """Turns the lists of JSON, at any depth, into the tuples of a spec."""
    if isinstance(value, list | tuple):
        return tuple(as_tuples(part) for part in value)
    return value


def from_json(text: str, where: str) -> Card:
    """Reads a card; raises UserError, calling it `where`, if it is none."""
    try:
        return Card(**{key: as_tuples(x) for key, x in json.loads(text).items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error).rstrip(".")
        raise UserError(f"The card of {where} cannot be used: {reason}.") from None


def default_card(network: str, spec: Spec | None = None, **facts) -> Card:
    """The card of weights that have none, from the conventions of the family.

    Args:
      network: any name that the zoo takes.
      spec: if it is not the zoo's.
      **facts: fields of the card that are known.
    """
    name, entry = resolve(network), get_entry(network)
    spec = spec or entry.spec
    interpolation = "bicubic" if entry.oracle == "timm" else "bilinear"
    card = {"image_size": entry.image_size, "interpolation": interpolation} | IMAGENET
    if entry.spec.for_small_images:
        card |= CIFAR10 | {"crop_fraction": 1.0}
    for pattern, family in FAMILIES.items():
        if fnmatch.fnmatch(name, pattern):
            card |= family
    classes = ()
    if spec.num_classes == 1000:
        classes = imagenet_classes()
    elif spec.num_classes == 10 and "CIFAR-10" in entry.top1_source:
        classes = CIFAR10_CLASSES
    card |= {"classes": classes, "scheme": entry.scheme}
    at_3_channels = dataclasses.replace(spec, in_channels=3)
    card = Card(network=name, spec=dataclasses.asdict(at_3_channels), **card)
    return dataclasses.replace(card.for_spec(spec), **facts)


def timm_card(config: Mapping[str, Any], origin: str) -> Card:
    """The card of timm's weights, from the `config.json` beside them.

    Raises UserError if the network is not in the zoo.
    """
    facts = config.get("pretrained_cfg", config)
    name = ALIASES.get(config["architecture"], config["architecture"])
    interpolation = facts.get("interpolation", "bilinear")
    if interpolation not in INTERPOLATIONS:
        raise UserError(
            f"{origin} wants the interpolation {interpolation!r}."
            f"{nearest(interpolation, INTERPOLATIONS)}"
        )
    channels, side, _ = facts["input_size"]
    spec = get_spec(name, num_classes=config["num_classes"], in_channels=channels)
    names = config.get("label_names") or facts.get("label_names")
    known = {}
    if names:
        if not isinstance(names, Mapping):
            names = dict(enumerate(names))
        # JSON's keys are strings; numbers may be left out.
        names = {int(number): name for number, name in names.items()}
        told = config.get("label_descriptions") or {}
        names = [names.get(i, f"class {i}") for i in range(spec.num_classes)]
        known["classes"] = tuple(told.get(name, name) for name in names)
    entry = get_entry(name)
    if facts.get("tag") and entry.top1_source == f"timm, {facts['tag']}":
        known["top1"] = entry.top1
    return default_card(
        name,
        spec,
        image_size=side,
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        interpolation=interpolation,
        crop_fraction=facts["crop_pct"],
        license=facts.get("license") or "",
        origin=origin,
        **known,
    )


@functools.cache
def imagenet_classes() -> tuple[str, ...]:
    """WordNet's ids of ImageNet's classes, which tensorflow_datasets ships."""
    package = importlib.util.find_spec("tensorflow_datasets")
    path = pathlib.Path(package.origin).parent / "datasets/imagenet2012/labels.txt"
    # Another release may keep them elsewhere.
    return tuple(path.read_text().split()) if path.exists() else ()
