"""Values that two frameworks draw alike, with no file between them.

A tensor's values depend on a seed, on our name for it and on its shape only.
"""

import functools
import math
import re
import zlib

import numpy as np

from resnet_jax.models import ResNetSpec
from resnet_jax.models.zoo import Spec
from resnet_jax.weights.naming import nest, shapes_of

# More values than that are repeated. It is no multiple of any number of channels, so
# that no two parts of a tensor are equal.
MOST = 1_000_003


def generator(name: str, seed: int = 0) -> np.random.Generator:
    """Returns the generator of one name."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def images(batch: int, size: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    """Draws standard normal images, `b h w c`."""
    rng = generator(f"images of {size}", seed)
    return rng.standard_normal((batch, size, size, channels), np.float32)


def labels(batch: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """Draws one class for each image."""
    return generator("labels", seed).integers(num_classes, size=batch)


def sizes(spec: Spec) -> tuple[int, int]:
    """A small even and a small odd image size.

    Either has layers of even and of odd outputs: 44, 22, 11, 6, 3, 2 and 45, 23, 12, 6,
    3, 2. Where strides average whole windows, every output must be even.
    """
    if spec.for_small_images:
        return 30, 31
    if getattr(spec, "head_pool", None) or getattr(spec, "anti_alias", None) == "avg":
        return 64, 63
    return 44, 45


def golden_sample(logits: np.ndarray) -> np.ndarray:
    """Picks the logits that are kept as golden figures: at most 20."""
    return logits[:, :: max(1, logits.shape[1] // 20)].ravel()


def variables(spec: Spec, seed: int = 0) -> dict:
    """Draws all variables of a network, none of them at its initial value."""
    draw = functools.partial(_draw, spec)
    return nest(
        spec, {name: draw(name, shape, seed) for name, shape in shapes_of(spec).items()}
    )


def _draw(spec: Spec, name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    rng = generator(name, seed)
    leaf = name.rpartition("/")[2]
    number = min(math.prod(shape), MOST)
    if leaf == "kernel":
        # He scale, so that activations keep their size through all layers; the head
        # has no rectifier behind it.
        gain = 1 if len(shape) < 4 else 2
        values = rng.standard_normal(number, np.float32)
        values *= np.float32(math.sqrt(gain / math.prod(shape[:-1])))
    elif leaf in ("scale", "var", "gain", "v", "skip_gain"):
        values = rng.uniform(0.5, 1.5, number).astype(np.float32)
    else:
        values = np.float32(0.1) * rng.standard_normal(number, np.float32)
    if _ends_a_block(spec, name):
        # At full scale, every block would double the variance of the sum.
        values /= np.float32(math.sqrt(sum(spec.stage_sizes)))
    # Not all of them: a copy costs as much as the drawing.
    whole = number == math.prod(shape)
    return values.reshape(shape) if whole else np.resize(values, shape)


def _ends_a_block(spec: Spec, name: str) -> bool:
    """Whether a scale or kernel is the last of a block's residual function."""
    if not isinstance(spec, ResNetSpec) or spec.shortcut == "none":
        return False
    if not (match := re.fullmatch(r"stage(\d+)_block\d+/(.*)", name)):
        return False
    last = 2 if spec.blocks[int(match[1]) - 1].endswith("basic") else 3
    ending = f"conv{last}/kernel" if spec.preact else f"norm{last}/scale"
    return match[2] == ending
