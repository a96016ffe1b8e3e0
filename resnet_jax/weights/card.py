"""Cards, which describe weights: their network, its input, its classes and origin."""

import dataclasses
import fnmatch
import functools
import importlib.util
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from resnet_jax.config.defaults import MAX_PIXELS
from resnet_jax.data.augment import Augment
from resnet_jax.data.resize import INTERPOLATIONS
from resnet_jax.data.user_images import Images, pictures_of
from resnet_jax.errors import BadImageError, BadValueError, UserError, nearest
from resnet_jax.models.inputs import normalize
from resnet_jax.models.spec import as_tuples
from resnet_jax.models.zoo import ALIASES, Spec, get_entry, get_spec, resolve

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
CIFAR10: dict[str, Any] = {
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# The input that most weights of a family were trained for. Later rows have precedence
# over earlier ones.
FAMILIES: dict[str, dict[str, Any]] = {
    "resnest*": {"interpolation": "bilinear"},
    "res2ne[tx]*": {"interpolation": "bilinear"},
    "resnetv2_*": HALF,
    "resnetv2_*_bit": {
        "interpolation": "bilinear",
        "image_size": 448,
        "crop_fraction": 1.0,
    },
    # Caffe's input is BGR from 0 to 255, minus the mean.
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
# The fields of a spec that the shapes of the head and of the first kernel determine.
ENDS = ("num_classes", "in_channels")
# The arguments of `timm.create_model` that do not change what a network computes, or
# that the shapes of the weights tell.
TIMM_ARGUMENTS = ("num_classes", "in_chans", "drop_rate", "drop_path_rate")


class Prediction(NamedTuple):
    """A class that a network predicts for an image.

    Attributes:
      index: The index of the class.
      name: The name of the class, or `class INDEX` if no name is known.
      probability: The probability that the network gives it, from 0 to 1.
    """

    # The public name hides tuple.index, which has no use here.
    index: int  # type: ignore[assignment]
    name: str
    probability: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """The description of weights, with all that is needed to use them.

    Attributes:
      network: The name of the network in the zoo.
      spec: The fields of the network's spec.
      scheme: The naming scheme of the tensors that the card describes.
      image_size: The side of the input in pixels.
      mean: The mean of each channel as the network sees it, from 0 to 1.
      std: The standard deviation of each channel, in the same unit.
      interpolation: The name of the resizing filter, as in `data.interpolation`.
      crop_fraction: The part of the resized short side that the central crop keeps.
      bgr: True if the channels are in the order of OpenCV and Caffe.
      classes: The names of the classes in the order of the logits, as far as known.
      license: The licence of the weights, as SPDX if their source gives it so.
      origin: The place where the weights come from.
      top1: The top-1 accuracy in percent that their source gives, or None.

    Raises:
      BadValueError: `mean`, `std` or `classes` do not fit the spec.
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
                f"mean and std must have {channels} entries, one per channel, but have"
                f" {len(self.mean)} and {len(self.std)}."
            )
        usable = all(map(math.isfinite, self.mean + self.std)) and min(self.std) > 0
        if not usable:
            raise BadValueError(
                f"mean {self.mean} and std {self.std} must be finite, and std above 0."
            )
        if len(self.classes) > classes:
            raise BadValueError(
                f"The card has {len(self.classes)} names for {classes} classes; give at"
                " most one name per class."
            )

    def make_spec(self) -> Spec:
        """Returns the network's spec; raises UserError if it has no such fields."""
        return get_spec(self.network, **self.spec)

    def overrides(self) -> dict[str, Any]:
        """Returns the fields in which the spec differs from the zoo's network.

        The numbers of classes and input channels are left out.
        """
        usual = dataclasses.asdict(get_spec(self.network))
        return {
            key: value
            for key, value in self.spec.items()
            if key not in ENDS and value != usual[key]
        }

    def for_spec(self, spec: Spec) -> "Card":
        """Returns the card for a spec with another number of classes or channels.

        With another number of classes, the card has neither their names nor an
        accuracy. Mean and std are averaged for one channel, and repeated for more.
        """
        changes: dict[str, Any] = {"spec": dataclasses.asdict(spec)}
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
        """Returns the card as JSON, with a line per field."""
        fields = dataclasses.asdict(self).items()
        lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in fields)
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def class_name(self, index: int) -> str:
        """Returns the name of a class, or `class INDEX` if no name is known."""
        return self.classes[index] if index < len(self.classes) else f"class {index}"

    def top(
        self, logits: Float[np.ndarray, " classes"], k: int = 5
    ) -> list[Prediction]:
        """Returns the k most probable classes of one image, the best one first.

        Args:
          logits: The logits of the image.
          k: The number of classes.
        """
        return most_probable(logits, k, self.class_name)

    def preprocess(
        self, images: Images, max_pixels: int = MAX_PIXELS
    ) -> Float32[Array, "n s s c"]:
        """Prepares images as in the evaluation of the weights' training.

        Images are decoded, turned upright as their EXIF data say, resized, cropped
        and normalised. Grey and colour images are converted to what the network takes,
        and transparency is dropped.

        Args:
          images: A path (also of `gs://` or `s3://`), the bytes of an image file, an
            image of Pillow, a uint8 array [h, w], [h, w, c] or [n, h, w, c] of NumPy
            or JAX, or a list of these, which may be mixed.
          max_pixels: The number of pixels beyond which an image file is rejected before
            memory is taken for them. The default is Pillow's limit.

        Returns:
          The network's input; a single image has n = 1.

        Raises:
          UserError: An image cannot be read, or has another form.

        Examples:
          >>> card = resnet_jax.load("runs/quickstart").card
          >>> card.preprocess(["seven.png", np.zeros((20, 30, 3), np.uint8)]).shape
          (2, 8, 8, 1)
        """
        return self.normalize(jnp.asarray(self.crop(images, max_pixels)))

    def crop(
        self, images: Images, max_pixels: int = MAX_PIXELS
    ) -> UInt8[np.ndarray, "n s s c"]:
        """Returns the pixels that the network sees, before they are normalised.

        The arguments and errors are those of `preprocess`.
        """
        pixels = list(self.crops(images, max_pixels))
        if not pixels:
            channels = self.spec["in_channels"]
            return np.zeros((0, self.image_size, self.image_size, channels), np.uint8)
        return np.stack(pixels)

    def crops(
        self, images: Images, max_pixels: int = MAX_PIXELS
    ) -> Iterator[UInt8[np.ndarray, "s s c"]]:
        """Yields the pixels of `crop`, reading each image when it is asked for.

        The arguments and errors are those of `preprocess`.
        """
        augment = Augment(
            size=self.image_size,
            crop_fraction=self.crop_fraction,
            interpolation=self.interpolation,
        )
        for picture in pictures_of(images, self.spec["in_channels"], self.network):
            try:
                yield augment(dataclasses.replace(picture, max_pixels=max_pixels))
            except BadImageError as error:
                reason = str(error).rstrip(".")
                raise BadImageError(f"{reason}; replace it or leave it out.") from None

    def normalize(self, pixels: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Normalises cropped pixels, which makes them the network's input."""
        if self.bgr:
            pixels = pixels[..., ::-1]
        return normalize(pixels, self.mean, self.std, jnp.float32)


def most_probable(
    logits: Float[np.ndarray, " classes"], k: int, class_name: Callable[[int], str]
) -> list[Prediction]:
    """Returns the k most probable classes of one image, the best one first.

    Args:
      logits: The logits of the image.
      k: The number of classes.
      class_name: Returns the name of a class.
    """
    logits = logits.astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")[:k].tolist()
    return [
        Prediction(index, class_name(index), float(probabilities[index]))
        for index in order
    ]


def from_json(text: str, weights: str) -> Card:
    """Parses a card.

    Args:
      text: The JSON of `Card.to_json`.
      weights: The name of its weights in a message.

    Raises:
      UserError: The text is not a card.
    """
    try:
        card = Card(**{key: as_tuples(x) for key, x in json.loads(text).items()})
        card.make_spec()
        return card
    # A network may be unknown, and JSON may be nested too deeply.
    except (
        *(ValueError, TypeError, LookupError, AttributeError, OverflowError),
        *(RecursionError, UserError),
    ) as error:
        reason = str(error).rstrip(".?")
        raise UserError(
            f"The card of {weights} cannot be used: {reason}. Correct it, or remove it"
            " and name the network."
        ) from None


def default_card(network: str, spec: Spec | None = None, **fields: Any) -> Card:
    """Makes a card by the conventions of a network's family.

    Args:
      network: The network's name in the zoo, or one that timm gives it.
      spec: The network's spec. None: the zoo's.
      **fields: Fields of the card that are known.

    Examples:
      >>> default_card("resnetv2_50").mean
      (0.5, 0.5, 0.5)
    """
    name, entry = resolve(network), get_entry(network)
    spec = spec or entry.spec
    interpolation = "bicubic" if entry.oracle == "timm" else "bilinear"
    defaults = {
        **IMAGENET,
        "image_size": entry.image_size,
        "interpolation": interpolation,
    }
    if entry.spec.for_small_images:
        defaults |= CIFAR10 | {"crop_fraction": 1.0}
    for pattern, family in FAMILIES.items():
        if fnmatch.fnmatch(name, pattern):
            defaults |= family
    classes: tuple[str, ...] = ()
    if spec.num_classes == 1000:
        classes = imagenet_classes()
    elif spec.num_classes == 10 and "CIFAR-10" in entry.top1_source:
        classes = CIFAR10_CLASSES
    defaults |= {"classes": classes, "scheme": entry.scheme}
    # The defaults are for three channels; `for_spec` adapts them.
    rgb_spec = dataclasses.replace(spec, in_channels=3)
    card = Card(network=name, spec=dataclasses.asdict(rgb_spec), **defaults)
    return dataclasses.replace(card.for_spec(spec), **fields)


def timm_card(config: Mapping[str, Any], origin: str) -> Card:
    """Makes the card of timm's weights.

    Args:
      config: The content of the `config.json` beside the weights.
      origin: The place where the weights come from.

    Raises:
      UserError: The network is not in the zoo, it was made with other arguments than
        timm's own, or its interpolation is not supported.
    """
    facts = config.get("pretrained_cfg", config)
    arguments = config.get("model_args") or {}
    if changes := {k: v for k, v in arguments.items() if k not in TIMM_ARGUMENTS}:
        text = ", ".join(f"{key}={value!r}" for key, value in changes.items())
        raise UserError(
            f"timm made it with {text[:200]}; give such changes as model.overrides, or"
            " as arguments of resnet_jax.load"
        )
    name = ALIASES.get(config["architecture"], config["architecture"])
    interpolation = facts.get("interpolation", "bilinear")
    if interpolation not in INTERPOLATIONS:
        raise UserError(
            f"{origin} needs the interpolation {interpolation!r}, which is not known."
            f"{nearest(interpolation, INTERPOLATIONS)}"
        )
    channels, side, _ = facts["input_size"]
    spec = get_spec(name, num_classes=config["num_classes"], in_channels=channels)
    names = config.get("label_names") or facts.get("label_names")
    known: dict[str, Any] = {}
    if names:
        if not isinstance(names, Mapping):
            names = dict(enumerate(names))
        # The keys of JSON are strings, and some classes may have no name.
        names = {int(number): name for number, name in names.items()}
        descriptions = config.get("label_descriptions") or {}
        names = [names.get(i, f"class {i}") for i in range(spec.num_classes)]
        known["classes"] = tuple(descriptions.get(name, name) for name in names)
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
    """Returns the WordNet ids of ImageNet's classes, which tensorflow_datasets ships.

    The result is empty if another release of it keeps them elsewhere.
    """
    package = importlib.util.find_spec("tensorflow_datasets")
    if not package or not package.origin:
        return ()
    path = pathlib.Path(package.origin).parent / "datasets/imagenet2012/labels.txt"
    return tuple(path.read_text().split()) if path.exists() else ()
