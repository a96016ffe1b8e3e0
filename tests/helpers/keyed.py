"""Draws parameters, images and labels from a generator that is seeded by their name.

The values of a tensor depend only on a seed, its name in this library and its shape. So
processes with different frameworks draw equal values without exchanging files.
"""

import functools
import math
import re
import zlib

import numpy as np

from resnet_jax.models import ResNetSpec
from resnet_jax.models.zoo import Spec
from resnet_jax.weights.naming import nest, shapes_of

# The number of values that are drawn for a larger tensor, which repeats them. It is not
# a multiple of any number of channels, so that no two rows of a tensor are equal.
MOST = 1_000_003


def generator(name: str, seed: int = 0) -> np.random.Generator:
    """Returns the random generator for a name."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def images(batch: int, size: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Draws square images of shape `b h w c` from a standard normal distribution."""
    rng = generator(f"images of {size}", seed)
    return rng.standard_normal((batch, size, size, channels), np.float32)


def labels(batch: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """Draws a label for each image of a batch, from 0 to `num_classes - 1`."""
    return generator("labels", seed).integers(num_classes, size=batch)


def sizes(spec: Spec) -> tuple[int, int]:
    """Returns a small even and a small odd image size for a network.

    Both sizes lead to layers with even and with odd outputs: 44, 22, 11, 6, 3, 2 and
    45, 23, 12, 6, 3, 2. Networks that downsample by averaging whole windows need even
    outputs in every layer, which 64 gives.
    """
    if spec.for_small_images:
        return 30, 31
    if getattr(spec, "head_pool", None) or getattr(spec, "anti_alias", None) == "avg":
        return 64, 63
    return 44, 45


def golden_sample(logits: np.ndarray) -> np.ndarray:
    """Selects the logits that are stored as golden figures, about 20 per image."""
    return logits[:, :: max(1, logits.shape[1] // 20)].ravel()


def variables(spec: Spec, seed: int = 0) -> dict:
    """Draws all variables of a network, so that none has its initial value."""
    draw = functools.partial(_draw, spec)
    return nest(
        spec, {name: draw(name, shape, seed) for name, shape in shapes_of(spec).items()}
    )


def _draw(spec: Spec, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = generator(name, seed)
    leaf = name.rpartition("/")[2]
    number = min(math.prod(shape), MOST)
    if leaf == "kernel":
        # He initialization keeps the scale of the activations through all layers. The
        # kernel of the head has two axes, and no rectifier follows it.
        gain = 1 if len(shape) < 4 else 2
        values = rng.standard_normal(number, np.float32)
        values *= np.float32(math.sqrt(gain / math.prod(shape[:-1])))
    elif leaf in ("scale", "var", "gain", "v", "skip_gain"):
        values = rng.uniform(0.5, 1.5, number).astype(np.float32)
    else:
        values = np.float32(0.1) * rng.standard_normal(number, np.float32)
    if _ends_a_block(spec, name):
        # At full scale, every block would double the variance of the activations.
        values /= np.float32(math.sqrt(sum(spec.stage_sizes)))
    # `np.resize` copies, which costs as much as drawing, so it is used for repetition
    # only.
    if number == math.prod(shape):
        return values.reshape(shape)
    return np.resize(values, shape)


def _ends_a_block(spec: Spec, name: str) -> bool:
    """Returns whether a scale or kernel is the last of a block's residual function."""
    if not isinstance(spec, ResNetSpec) or spec.shortcut == "none":
        return False
    if not (match := re.fullmatch(r"stage(\d+)_block\d+/(.*)", name)):
        return False
    last = 2 if spec.blocks[int(match[1]) - 1].endswith("basic") else 3
    ending = f"conv{last}/kernel" if spec.preact else f"norm{last}/scale"
    return match[2] == ending
