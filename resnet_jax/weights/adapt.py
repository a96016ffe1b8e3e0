"""Fits weights to a network with another head or input, and to the data of a run."""

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
    variables: dict, spec: Spec, target: Spec, *, seed: int, where: str
) -> dict:
    """Gives variables the number of input channels and of classes of another spec.

    Args:
      variables: Variables of a network of `spec`.
      spec: The network that the variables belong to.
      target: The same network with the wanted channels and classes.
      seed: The seed of a new head, which is the one that a run with that seed has.
      where: The name of the weights in a warning.
    """
    flat = flatten_dict(variables)
    if target.in_channels != spec.in_channels:
        log.warning(
            "%s has %d input channels; its first kernel is adapted to %d.",
            *(where, spec.in_channels, target.in_channels),
        )
        key = _first_kernel(spec)
        flat[key] = adapt_channels(flat[key], target.in_channels)
    if target.num_classes != spec.num_classes:
        log.warning(
            "%s has %d classes; the head for %d is a fresh one.",
            *(where, spec.num_classes, target.num_classes),
        )
        flat = _with_fresh_head(flat, target, seed)
    return unflatten_dict(flat)


def as_rgb(card: Card, variables: dict) -> tuple[Card, dict]:
    """Returns the same function of an image for RGB input, if its input is BGR.

    The first kernel's input channels are reversed, and so are mean and std.
    """
    if not card.bgr:
        return card, variables
    flat = flatten_dict(variables)
    key = _first_kernel(card.make_spec())
    flat[key] = flat[key][:, :, ::-1]
    card = dataclasses.replace(
        card, bgr=False, mean=card.mean[::-1], std=card.std[::-1]
    )
    return card, unflatten_dict(flat)


def fit_classes(
    card: Card,
    variables: dict,
    classes: Sequence[str],
    *,
    seed: int,
    where: str,
) -> dict:
    """Gives variables the head for classes of these names in this order.

    A head for the same names in another order is reordered. One for other names is
    replaced by a fresh one. A warning tells either. Without names of all classes
    nothing is known, and the head stays.
    """
    spec, classes = card.make_spec(), tuple(classes)
    if card.classes == classes or not (
        len(card.classes) == len(classes) == spec.num_classes
    ):
        return variables
    flat = flatten_dict(variables)
    if set(card.classes) == set(classes):
        log.warning("The head of %s is reordered to the order of the classes.", where)
        order = [card.classes.index(name) for name in classes]
        for key in [key for key in flat if key[:2] == ("params", "head")]:
            flat[key] = flat[key][..., order]
        return unflatten_dict(flat)
    new = next(name for name in classes if name not in card.classes)
    log.warning(
        "%s was trained for other classes (%r is not among them); the head is a fresh"
        " one.",
        *(where, new),
    )
    return unflatten_dict(_with_fresh_head(flat, spec, seed))


def input_differences(card: Card, data: ConfigDict) -> list[str]:
    """Returns the overrides that prepare a run's input as the weights expect it.

    Args:
      card: The card of the weights, with as many channels as `data` has.
      data: `config.data`.
    """
    found = []
    for key in ("mean", "std"):
        wanted = getattr(card, key)
        # Cards and configs may round to five digits.
        if not np.allclose(wanted, data[key], rtol=0, atol=1e-5):
            numbers = ", ".join(f"{value:.5g}" for value in wanted)
            numbers += "," if len(wanted) == 1 else ""
            found.append(f'--config.data.{key}="({numbers})"')
    if card.interpolation != data.interpolation:
        found.append(f"--config.data.interpolation={card.interpolation}")
    return found


def adapt_channels(
    kernel: Float[np.ndarray, "h w i o"], channels: int
) -> Float[np.ndarray, "h w {channels} o"]:
    """A first kernel for another number of input channels, as timm makes it.

    One channel gets the sum over the old ones; more get them over and over, scaled so
    that the sum over channels stays about what it was.
    """
    old = kernel.shape[2]
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    repeated = np.tile(kernel, (1, 1, -(-channels // old), 1))[:, :, :channels]
    return repeated * np.float32(old / channels)


def _first_kernel(spec: Spec) -> tuple[str, ...]:
    return ("params", *FIRST_CONVS[type(spec)].split("/"), "kernel")


def _with_fresh_head(flat: dict, spec: Spec, seed: int) -> dict:
    flat = {key: x for key, x in flat.items() if key[:2] != ("params", "head")}
    if spec.num_classes:
        flat |= flatten_dict({"params": {"head": _fresh_head(spec, seed)}})
    return flat


def _fresh_head(spec: Spec, seed: int) -> dict:
    image = jnp.zeros((1, 64, 64, spec.in_channels))

    # The compiler leaves out all but the head.
    @jax.jit
    def init():
        return build(spec).init(jax.random.key(seed), image)["params"]["head"]

    return jax.tree.map(np.asarray, init())
