"""Networks with trained weights that predict from images: `resnet_jax.load`."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, UInt8

from resnet_jax.config.defaults import MAX_PIXELS
from resnet_jax.data.user_images import Images
from resnet_jax.errors import UserError
from resnet_jax.models import build
from resnet_jax.models.cost import count
from resnet_jax.parallel.sharding import find_devices
from resnet_jax.weights import load as weights_load
from resnet_jax.weights.card import Card, Prediction

# The largest number of images that are computed at a time, unless another is given.
BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrainedModel:
    """A network with its weights and their card, which describes its input.

    `load` makes it, and it unpacks: `module, variables, card = resnet_jax.load(...)`.
    Its methods take images in any form that `Card.preprocess` takes: a path, the bytes
    of an image file, an image of Pillow, a uint8 array [h, w], [h, w, c] or
    [n, h, w, c], or a list of these. The result for an image does not depend on the
    other images. Images are read one after the other and computed `batch_size` at a
    time, 32 by default. A program is compiled once for each batch size that is needed:
    `batch_size`, and powers of two below it for fewer images. The first image that
    cannot be read raises an error that names it; to go on with the others, call
    `Card.crops` for each image, and `stream_logits`.

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

    def predict(
        self,
        images: Images,
        k: int = 5,
        max_pixels: int = MAX_PIXELS,
        *,
        batch_size: int = BATCH_SIZE,
        flip: bool = False,
    ) -> list[list[Prediction]]:
        """Returns the most probable classes of each image, the best one first.

        Args:
          images: The images, in any form that `Card.preprocess` takes.
          k: The number of classes, of which a network may have fewer.
          max_pixels: The limit of `Card.preprocess` on image files.
          batch_size: The largest number of images that are computed at a time.
          flip: True to take the mean of the logits of each image and of its mirror
            image, as `evaluate.views=flip` does.

        Raises:
          UserError: The network has no head, or an image cannot be read.

        Examples:
          >>> model = resnet_jax.load("runs/quickstart")
          >>> for predictions in model.predict(["seven.png", "three.png"], k=1):
          ...     print(predictions[0].name)
          7
          3
        """
        if not isinstance(k, int | np.integer) or k < 1:
            raise UserError(f"k={k!r} is not a number of classes; give at least 1.")
        rows = self.logits(images, max_pixels, batch_size=batch_size, flip=flip)
        return [self.card.top(values, k) for values in rows]

    def logits(
        self,
        images: Images,
        max_pixels: int = MAX_PIXELS,
        *,
        batch_size: int = BATCH_SIZE,
        flip: bool = False,
    ) -> Float32[np.ndarray, "n classes"]:
        """Returns the logits of each image.

        Args:
          images: The images, in any form that `Card.preprocess` takes.
          max_pixels: The limit of `Card.preprocess` on image files.
          batch_size: The largest number of images that are computed at a time.
          flip: True to take the mean of the logits of each image and of its mirror
            image, as `evaluate.views=flip` does.

        Raises:
          UserError: The network has no head, or an image cannot be read.

        Examples:
          >>> model = resnet_jax.load("runs/quickstart")
          >>> model.logits(["seven.png", np.zeros((8, 8), np.uint8)]).shape
          (2, 10)
        """
        return self._compute(self._logits_of(flip), images, max_pixels, batch_size)

    def stream_logits(
        self,
        crops: Iterable[UInt8[np.ndarray, "s s c"]],
        *,
        batch_size: int = BATCH_SIZE,
        flip: bool = False,
    ) -> Iterator[Float32[np.ndarray, " classes"]]:
        """Yields the logits of one image after the other, for any number of them.

        At most two batches are in memory at a time.

        Args:
          crops: The pixels that the network sees, as `Card.crops` yields them.
          batch_size: The largest number of images that are computed at a time.
          flip: True to take the mean of the logits of each image and of its mirror
            image, as `evaluate.views=flip` does.

        Raises:
          UserError: The network has no head.

        Examples:
          >>> model = resnet_jax.load("runs/quickstart")
          >>> crops = (model.card.crop(path)[0] for path in ["seven.png", "three.png"])
          >>> for logits in model.stream_logits(crops):
          ...     print(model.card.top(logits, k=1)[0].name)
          7
          3
        """
        return self._stream(self._logits_of(flip), crops, batch_size)

    def features(
        self, images: Images, max_pixels: int = MAX_PIXELS
    ) -> Float32[np.ndarray, "n width"]:
        """Returns the pooled features of each image, which are the head's input.

        Args:
          images: The images, in any form that `Card.preprocess` takes.
          max_pixels: The limit of `Card.preprocess` on image files.

        Raises:
          UserError: An image cannot be read.

        Examples:
          >>> model = resnet_jax.load("runs/quickstart")
          >>> model.features("seven.png").shape
          (1, 64)
        """
        return self._compute(self._features_of, images, max_pixels, BATCH_SIZE)

    def _logits_of(self, flip: bool) -> Callable:
        if not self.card.spec["num_classes"]:
            raise UserError(
                f"{self.card.network} has no head, so it predicts no classes. Call"
                " `features` for its pooled features."
            )
        return self._flip_program if flip else self._program

    @functools.cached_property
    def _program(self) -> Callable:
        return jax.jit(self._function_of(self.module))

    @functools.cached_property
    def _flip_program(self) -> Callable:
        logits_of = self._function_of(self.module)

        def mean_logits(variables, x):
            # The views are computed one after the other, as in an evaluation.
            views = jnp.stack([x, x[:, :, ::-1]])
            logits = jax.lax.map(functools.partial(logits_of, variables), views)
            return jnp.mean(logits, axis=0)

        return jax.jit(mean_logits)

    @functools.cached_property
    def _features_of(self) -> Callable:
        spec = dataclasses.replace(self.module.spec, num_classes=0)
        return jax.jit(self._function_of(self.module.clone(spec=spec)))

    def _function_of(self, module: nn.Module) -> Callable:
        normalize = self.card.normalize
        return lambda variables, x: module.apply(variables, normalize(x))

    def _compute(
        self, function: Callable, images: Images, max_pixels: int, batch_size: int
    ) -> np.ndarray:
        """Returns the outputs of a function of (variables, pixels) for all images."""
        crops = self.card.crops(images, max_pixels)
        rows = list(self._stream(function, crops, batch_size))
        if rows:
            return np.stack(rows)
        image = jax.ShapeDtypeStruct((1, *self.card.crop([]).shape[1:]), np.uint8)
        shape = jax.eval_shape(function, self.variables, image).shape
        return np.zeros((0, *shape[1:]), np.float32)

    def _stream(
        self, function: Callable, crops: Iterable[np.ndarray], batch_size: int
    ) -> Iterator[np.ndarray]:
        """Yields the outputs of a function of (variables, pixels) for each image."""
        if not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise UserError(
                f"batch_size={batch_size!r} is not a number of images; give at least 1."
            )
        crops, size = iter(crops), 0
        before: Iterable[np.ndarray] = ()
        while batch := list(itertools.islice(crops, batch_size)):
            # All batches have the size of the first one, rounded up to a power of two,
            # so that the last one needs no program of its own.
            size = size or min(1 << (len(batch) - 1).bit_length(), batch_size)
            padding = [(0, size - len(batch))] + [(0, 0)] * 3
            outputs = function(self.variables, np.pad(np.stack(batch), padding))
            # The device computes while the next images are read, so the outputs of the
            # batch before are fetched now.
            yield from before
            before = _rows(outputs, len(batch))
        yield from before


def _rows(outputs: jax.Array, count: int) -> Iterator[np.ndarray]:
    yield from np.asarray(outputs, np.float32)[:count]


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

    Examples:
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
