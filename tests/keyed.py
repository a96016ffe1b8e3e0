"""Values that two frameworks draw alike, with no file between them.

A tensor's values depend on a seed, its name and its shape only. Names and shapes are
those of torchvision's `state_dict` (resnet_jax/weights/torchvision.py).
"""

import math
import zlib
from collections.abc import Mapping

import jax
import numpy as np

from resnet_jax.models import ResNet, ResNetSpec
from resnet_jax.models.cost import init_shapes
from resnet_jax.weights.torchvision import from_torch, to_torch


def generator(name: str, seed: int = 0) -> np.random.Generator:
    """Returns the generator of one name."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def images(batch: int, size: int, seed: int = 0) -> np.ndarray:
    """Draws standard normal images, `b h w c`."""
    rng = generator(f"images of {size}", seed)
    return rng.standard_normal((batch, size, size, 3), np.float32)


def labels(batch: int, num_classes: int, seed: int = 0) -> np.ndarray:
    """Draws one class for each image."""
    return generator("labels", seed).integers(num_classes, size=batch)


def golden_sizes(spec: ResNetSpec) -> tuple[int, int]:
    """The even and the odd image size of a network's golden figures."""
    return (64, 65) if spec.stem == "imagenet" else (32, 33)


def golden_sample(logits: np.ndarray) -> np.ndarray:
    """Picks the logits that are kept as golden figures: at most 20 an image."""
    return logits[:, :: max(1, logits.shape[1] // 20)].ravel()


def state_dict(
    shapes: Mapping[str, tuple[int, ...]], seed: int = 0
) -> dict[str, np.ndarray]:
    """Draws all tensors of a network, none of them at its initial value.

    Args:
      shapes: the `state_dict`'s names and shapes, without `num_batches_tracked`.
      seed: of all tensors.
    """
    return {name: _draw(name, shapes, generator(name, seed)) for name in shapes}


def variables(spec: ResNetSpec, seed: int = 0) -> dict:
    """Draws the same for one of our networks."""
    # Placeholders that take no memory: only their shapes are read.
    places = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape),
        init_shapes(ResNet(spec), image_size=32),
    )
    shapes = {name: value.shape for name, value in to_torch(places, spec).items()}
    return from_torch(state_dict(shapes, seed), spec)


def _draw(
    name: str, shapes: Mapping[str, tuple[int, ...]], rng: np.random.Generator
) -> np.ndarray:
    shape = shapes[name]
    module, _, leaf = name.rpartition(".")
    if len(shape) > 1:
        # He scale, so that activations keep their size through all layers; the head
        # has no rectifier behind it.
        gain = 2 if len(shape) == 4 else 1
        std = math.sqrt(gain / math.prod(shape[1:]))
        return np.float32(std) * rng.standard_normal(shape, np.float32)
    if leaf == "running_var":
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if leaf == "weight":
        # At full scale, every block would double the variance of the sum.
        ends = _last_norms(shapes)
        size = 1 / math.sqrt(len(ends)) if module in ends else 1
        return (size * rng.uniform(0.5, 1.5, shape)).astype(np.float32)
    return np.float32(0.1) * rng.standard_normal(shape, np.float32)


def _last_norms(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Names of the norms that end a block's residual function."""
    last = ".bn3" if any(".bn3." in name for name in shapes) else ".bn2"
    modules = {name.rpartition(".")[0] for name in shapes}
    return {module for module in modules if module.endswith(last)}
