"""Adapts weights to another head or input, and to the data of a run."""

import dataclasses
import logging
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float
from ml_collections import ConfigDict

from resnet_jax.models.baselines import HighwaySpec, VGGSpec
from resnet_jax.models.spec import ResNetSpec
from resnet_jax.models.zoo import Spec, build
from resnet_jax.weights.card import Card

log = logging.getLogger(__name__)

FIRST_CONVS = {
    ResNetSpec: "stem_conv1",
    VGGSpec: "stage1_conv1",
    HighwaySpec: "stage1_layer1/conv",
}


def fit_ends(
    variables: dict, spec: Spec, target: Spec, *, seed: int, weights: str
) -> dict:
    """Adapts variables to a spec with other input channels or classes.

    A kernel for other channels is computed from the old one. A head for another number
    of classes is randomly initialised. A warning reports each.

    Args:
      variables: Variables of a network of `spec`.
      spec: The network that the variables belong to.
      target: The same network with the new channels and classes.
      seed: The seed of a new head, which is the one that a run with that seed has.
      weights: The name of the weights in a warning.
    """
    flat = flatten_dict(variables)
    if target.in_channels != spec.in_channels:
        log.warning(
            "%s has %d input channels; its first kernel is adapted to %d.",
            *(weights, spec.in_channels, target.in_channels),
        )
        key = _first_kernel(spec)
        flat[key] = adapt_channels(flat[key], target.in_channels)
    if target.num_classes != spec.num_classes:
        has = f"{spec.num_classes} classes" if spec.num_classes else "no head"
        new = (
            f"the head for {target.num_classes} is randomly initialised"
            if target.num_classes
            else "its head is left out"
        )
        log.warning("%s has %s; %s.", weights, has, new)
        flat = _with_new_head(flat, target, seed)
    return unflatten_dict(flat)


def as_rgb(card: Card, variables: dict) -> tuple[Card, dict]:
    """Converts weights for BGR input to the same function of RGB input.

    The first kernel's input channels are reversed, and so are mean and std. Weights
    for RGB input stay as they are.
    """
    if not card.bgr:
        return card, variables
    flat = flatten_dict(variables)
    key = _first_kernel(card.make_spec())
    flat[key] = flat[key][:, :, ::-1]
    return as_rgb_card(card), unflatten_dict(flat)


def as_rgb_card(card: Card) -> Card:
    """Returns the card of the weights that `as_rgb` converts."""
    if not card.bgr:
        return card
    return dataclasses.replace(
        card, bgr=False, mean=card.mean[::-1], std=card.std[::-1]
    )


def fit_classes(
    card: Card,
    variables: dict,
    classes: Sequence[str],
    *,
    seed: int,
    weights: str,
) -> dict:
    """Adapts the head of variables to classes of these names in this order.

    A head for the same names in another order is reordered. A head for other names is
    randomly initialised. A warning reports each. The head stays as it is if the card
    does not name all classes.

    Args:
      card: The card of the variables.
      variables: The variables.
      classes: The names of the new classes.
      seed: The seed of a randomly initialised head.
      weights: The name of the weights in a warning.
    """
    spec = card.make_spec()
    classes = tuple(classes)
    if card.classes == classes or not (
        len(card.classes) == len(classes) == spec.num_classes
    ):
        return variables
    flat = flatten_dict(variables)
    if set(card.classes) == set(classes):
        log.warning("The head of %s is reordered to the order of the classes.", weights)
        order = [card.classes.index(name) for name in classes]
        for key in [key for key in flat if key[:2] == ("params", "head")]:
            flat[key] = flat[key][..., order]
        return unflatten_dict(flat)
    unknown = next(name for name in classes if name not in card.classes)
    log.warning(
        "%s was trained for other classes (%r is not among them); the head is randomly"
        " initialised.",
        *(weights, unknown),
    )
    return unflatten_dict(_with_new_head(flat, spec, seed))


def input_differences(card: Card, data: ConfigDict) -> list[str]:
    """Returns the command-line overrides that give a run the weights' input.

    Args:
      card: The card of the weights, with as many channels as `data` has.
      data: `config.data`.
    """
    overrides = []
    for key in ("mean", "std"):
        expected = getattr(card, key)
        # Cards and configs may round to five digits.
        if not np.allclose(expected, data[key], rtol=0, atol=1e-5):
            numbers = ", ".join(f"{value:.5g}" for value in expected)
            numbers += "," if len(expected) == 1 else ""
            overrides.append(f'--config.data.{key}="({numbers})"')
    if card.interpolation != data.interpolation:
        overrides.append(f"--config.data.interpolation={card.interpolation}")
    return overrides


def adapt_channels(
    kernel: Float[np.ndarray, "h w i o"], channels: int
) -> Float[np.ndarray, "h w {channels} o"]:
    """Returns a first kernel for another number of input channels, as timm makes it.

    For one channel it is the sum over the old channels. For more channels the old ones
    are repeated, and scaled so that their sum stays about the same.
    """
    old_channels = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, -(-channels // old_channels), 1))[:, :, :channels]
    return repeated * np.float32(old_channels / channels)


def _first_kernel(spec: Spec) -> tuple[str, ...]:
    return ("params", *FIRST_CONVS[type(spec)].split("/"), "kernel")


def _with_new_head(flat: dict, spec: Spec, seed: int) -> dict:
    flat = {key: x for key, x in flat.items() if key[:2] != ("params", "head")}
    if spec.num_classes:
        flat |= flatten_dict({"params": {"head": _new_head(spec, seed)}})
    return flat


def _new_head(spec: Spec, seed: int) -> dict:
    image = jnp.zeros((1, 64, 64, spec.in_channels))

    # The compiler removes all computation but the head's.
    @jax.jit
    def init():
        return build(spec).init(jax.random.key(seed), image)["params"]["head"]

    return jax.tree.map(np.asarray, init())
