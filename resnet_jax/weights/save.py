"""Writes variables as a file of any framework, or as a weights directory."""

import dataclasses

from resnet_jax.errors import UserError, nearest
from resnet_jax.persistence.storage import Path, path_of
from resnet_jax.weights import files, native
from resnet_jax.weights.card import Card
from resnet_jax.weights.load import schemes_of
from resnet_jax.weights.naming import Scheme, to_theirs


def save(target: str, variables: dict, card: Card, to: str | None = None) -> Card:
    """Writes variables as a file or weights directory; returns the card in it.

    Args:
      target: The path of a file, whose suffix names the format, or of a directory.
      variables: The collections `params` and `batch_stats`.
      card: The card of the variables, whatever its naming scheme.
      to: The name of the naming scheme. By default it is the network's own, or BiT's
        in `.npz`.

    Raises:
      UserError: The network has no such names, or the file system refuses.
    """
    path = path_of(target)
    if is_directory(target):
        scheme = native.OWN
        if to not in (None, scheme.name):
            raise UserError(
                f"{path} is to be a directory, which has our names; for those of {to}"
                f" give a file: {', '.join(files.SUFFIXES)}."
            )
        card = dataclasses.replace(card, scheme=scheme.name)
        native.write(path, variables, card)
        return card
    scheme = _choose(path, card, to)
    card = dataclasses.replace(card, scheme=scheme.name)
    files.write(path, to_theirs(variables, card.make_spec(), scheme), card)
    return card


def is_directory(target: str) -> bool:
    """Returns whether a name is that of a weights directory, not of a file."""
    path = path_of(target)
    return target.endswith("/") or path.is_dir() or not path.suffix


def _choose(path: Path, card: Card, to: str | None) -> Scheme:
    schemes = {x.name: x for x in schemes_of(card.network, path.suffix)}
    if not schemes:
        raise UserError(
            f"{card.network} is no network of Keras, so {path.name} would fit none;"
            " write .safetensors."
        )
    to = to or next(iter(schemes))
    if to not in schemes:
        raise UserError(
            f"{card.network} cannot be written under the names of {to!r}."
            f"{nearest(to, schemes)}"
        )
    return schemes[to]
