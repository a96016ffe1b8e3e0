"""Networks with trained weights that predict from images: `resnet_jax.load`."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float32

from resnet_jax.data.user_images import Images, pictures_of
from resnet_jax.errors import UserError
from resnet_jax.models import build
from resnet_jax.models.cost import count
from resnet_jax.parallel.sharding import find_devices
from resnet_jax.weights import load as weights_load
from resnet_jax.weights.card import Card, Prediction

# The largest number of images that are computed at a time.
BATCH = 32


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedModel:
    """A network with its weights and their card, which describes its input.

    `load` makes it, and it unpacks: `module, variables, card = resnet_jax.load(...)`.
    Its methods take images in any form that `Card.preprocess` takes: a path, the bytes
    of an image file, an image of Pillow, a uint8 array [h, w], [h, w, c] or
    [n, h, w, c], or a list of these. The result for an image does not depend on the
    other images. At most 32 images are read and computed at a time, and a program is
    compiled once for each of the batch sizes 1, 2, 4, 8, 16 and 32 that is needed.

    Attributes:
      module: The Flax module.
      variables: Its variables, the collections `params` and `batch_stats`.
      card: The card of the weights.
    """

    module: nn.Module
    variables: Mapping[str, Any]
    card: Card

    def __iter__(self) -> Iterator[Any]:
        return iter((self.module, self.variables, self.card))

    def __reduce__(self) -> tuple:
        # The compiled programs are left out, since they cannot be pickled.
        return type(self), tuple(self)

    def __repr__(self) -> str:
        card = self.card
        shape = (card.image_size, card.image_size, card.spec["in_channels"])
        return (
            f"TrainedModel(network={card.network!r},"
            f" parameters={count(self.variables['params'])},"
            f" classes={card.spec['num_classes']}, input={shape},"
            f" origin={card.origin!r})"
        )

    def predict(self, images: Images, k: int = 5) -> list[list[Prediction]]:
        """Returns the most probable classes of each image, the best one first.

        Args:
          images: The images, in any form that `Card.preprocess` takes.
          k: The number of classes, of which a network may have fewer.

        Raises:
          UserError: The network has no head, or an image cannot be read.

        Example:
          >>> model = resnet_jax.load("runs/quickstart")
          >>> for predictions in model.predict(["seven.png", "three.png"], k=1):
          ...     print(predictions[0].name)
          7
          3
        """
        if not isinstance(k, int) or k < 1:
            raise UserError(f"k={k} is not a number of classes; give at least 1.")
        return [self.card.top(values, k) for values in self.logits(images)]

    def logits(self, images: Images) -> Float32[np.ndarray, "n classes"]:
        """Returns the logits of each image.

        Args:
          images: The images, in any form that `Card.preprocess` takes.

        Raises:
          UserError: The network has no head, or an image cannot be read.

        Example:
          >>> model = resnet_jax.load("runs/quickstart")
          >>> model.logits(["seven.png", np.zeros((8, 8), np.uint8)]).shape
          (2, 10)
        """
        if not self.card.spec["num_classes"]:
            raise UserError(
                f"{self.card.network} has no head, so it predicts no classes. Call"
                " `features` for its pooled features."
            )
        return self._compute(self._logits_of, images)

    def features(self, images: Images) -> Float32[np.ndarray, "n width"]:
        """Returns the pooled features of each image, which are the head's input.

        Args:
          images: The images, in any form that `Card.preprocess` takes.

        Raises:
          UserError: An image cannot be read.

        Example:
          >>> model = resnet_jax.load("runs/quickstart")
          >>> model.features("seven.png").shape
          (1, 64)
        """
        return self._compute(self._features_of, images)

    @functools.cached_property
    def _logits_of(self) -> Callable:
        return self._compile(self.module)

    @functools.cached_property
    def _features_of(self) -> Callable:
        spec = dataclasses.replace(self.module.spec, num_classes=0)
        return self._compile(self.module.clone(spec=spec))

    def _compile(self, module: nn.Module) -> Callable:
        normalize = self.card.normalize
        return jax.jit(lambda variables, x: module.apply(variables, normalize(x)))

    def _compute(self, function: Callable, images: Images) -> np.ndarray:
        """Returns the outputs of a function of (variables, pixels) for all images."""
        channels, network = self.card.spec["in_channels"], self.card.network
        pictures = pictures_of(images, channels, network)
        size, results = 0, []
        while batch := list(itertools.islice(pictures, BATCH)):
            pixels = self.card.crop(batch)
            # All batches have the size of the first one, rounded up to a power of two.
            size = size or 1 << (len(batch) - 1).bit_length()
            padding = [(0, size - len(batch))] + [(0, 0)] * 3
            results.append((function(self.variables, np.pad(pixels, padding)), batch))
        if not results:
            image = jax.ShapeDtypeStruct((1, *self.card.crop([]).shape[1:]), np.uint8)
            shape = jax.eval_shape(function, self.variables, image).shape
            return np.zeros((0, *shape[1:]), np.float32)
        # Devices compute while the next images are read, so results are fetched last.
        return np.concatenate(
            [np.asarray(x, np.float32)[: len(batch)] for x, batch in results]
        )


def load(
    weights: str | os.PathLike[str],
    model: str | None = None,
    seed: int = 0,
    **overrides: Any,
) -> TrainedModel:
    """Loads weights with the network they belong to.

    The first kernel is adapted to another number of input channels. A head of another
    number of classes is randomly initialised, and a warning says so.

    Args:
      weights: A file of torchvision, timm, Keras or BiT, a workdir of a run, a weights
        directory, or `timm:NAME.TAG`, which is on the Hugging Face hub.
      model: The network's name, if neither the weights nor a card beside them say it.
        By default weights without a card are those of the first network that they
        fit.
      seed: The seed of a randomly initialised head, which is the head that a run with
        this seed has.
      **overrides: Fields of the network's spec to replace, such as `num_classes=10`.

    Returns:
      The network with its float32 variables and its card.

    Raises:
      UserError: There are no such weights, they cannot be read, or they do not fit
        the network.

    Example:
      >>> model = resnet_jax.load("runs/quickstart")
      >>> model.predict("seven.png")[0][0].name
      '7'
      >>> module, variables, card = model
      >>> module.apply(variables, card.preprocess("seven.png")).shape
      (1, 10)
    """
    # A missing device is reported before anything is read.
    find_devices()
    card, variables = weights_load.load(
        os.fspath(weights), model=model, seed=seed, **overrides
    )
    return TrainedModel(build(card.make_spec()), jax.device_put(variables), card)
