"""Writes variables as a file of another framework, or as a weights directory."""

import dataclasses

from resnet_jax.errors import UserError, nearest
from resnet_jax.persistence.storage import Path, path_of
from resnet_jax.weights import files, native
from resnet_jax.weights.card import Card
from resnet_jax.weights.load import schemes_of
from resnet_jax.weights.naming import Scheme, to_foreign


def save(
    target: str, variables: dict, card: Card, scheme_name: str | None = None
) -> Card:
    """Writes variables as a file or weights directory; returns the card in it.

    Args:
      target: The path of a file, whose suffix names the format, or of a directory.
      variables: The collections `params` and `batch_stats`.
      card: The card of the variables, whatever its naming scheme.
      scheme_name: The name of the naming scheme. None: the scheme of the network's
        entry in the zoo, or BiT's in an `.npz` of a BiT network.

    Raises:
      UserError: The network has no names in that scheme or format, or the target
        cannot be written.
    """
    path = path_of(target)
    if is_directory(target):
        scheme = native.NATIVE
        if scheme_name not in (None, scheme.name):
            raise UserError(
                f"{path} is a directory, whose naming scheme is always {scheme.name}."
                f" For the scheme {scheme_name} give a file that ends in one of"
                f" {', '.join(files.SUFFIXES)}."
            )
        card = dataclasses.replace(card, scheme=scheme.name)
        native.write(path, variables, card)
        return card
    scheme = _choose(path, card, scheme_name)
    card = dataclasses.replace(card, scheme=scheme.name)
    files.write(path, to_foreign(variables, card.make_spec(), scheme), card)
    return card


def is_directory(target: str) -> bool:
    """Returns whether a path names a weights directory rather than a file."""
    path = path_of(target)
    return target.endswith("/") or path.is_dir() or not path.suffix


def _choose(path: Path, card: Card, scheme_name: str | None) -> Scheme:
    schemes = {x.name: x for x in schemes_of(card.network, files.suffix_of(path))}
    if not schemes:
        raise UserError(
            f"Keras has no network {card.network}, so {path.name} would fit none of its"
            " networks. Write .safetensors."
        )
    chosen = scheme_name or next(iter(schemes))
    if chosen not in schemes:
        raise UserError(
            f"{card.network} has no names in the scheme {chosen!r}."
            f"{nearest(chosen, schemes)}"
        )
    return schemes[chosen]
