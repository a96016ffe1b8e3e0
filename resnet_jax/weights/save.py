"""Writes variables as a file of another framework, or as a weights directory."""

import dataclasses

from resnet_jax.errors import UserError, nearest
from resnet_jax.models.zoo import get_entry
from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import Path, path_of
from resnet_jax.weights import files, hub, native
from resnet_jax.weights.card import Card
from resnet_jax.weights.load import schemes_of
from resnet_jax.weights.naming import Scheme, to_foreign
from resnet_jax.weights.receivers import receiver_of, timm_config


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

    If timm makes the network with other arguments than its own, they are written as
    timm's config beside the file: `config.json` beside the hub's `model.safetensors`
    and `pytorch_model.bin`, and otherwise NAME.config.json.
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
    config = _config_path(path)
    # Another program's `config.json` is not replaced.
    if (
        config.name == "config.json"
        and config.exists()
        and "architecture" not in config.read_text(errors="replace")
    ):
        raise UserError(
            f"{config} is not timm's, so {path.name} cannot have timm's beside it;"
            " choose another directory or name."
        )
    text = _timm_config(card, config)
    files.write(path, to_foreign(variables, card.make_spec(), scheme), card)
    with storage.explaining_errors(config):
        if text:
            config.write_text(text)
        else:
            # That of a former file would describe another network.
            config.unlink(missing_ok=True)
    return card


def _timm_config(card: Card, config: Path) -> str:
    """Returns the config with which timm makes a card's network; "" for none.

    Without other arguments than timm's own, only the hub's files have one.
    """
    if get_entry(card.network).oracle != "timm":
        return ""
    receiver = receiver_of(card)
    if not receiver or receiver.impossible:
        return ""
    if receiver.model_args or config.name == "config.json":
        return timm_config(card, receiver.model_args)
    return ""


def loading_advice(card: Card, target: str) -> str:
    """Returns sentences on how the library of a file's names loads it, or "".

    Args:
      card: The card of the file, which `save` returns.
      target: The path of the file.
    """
    receiver = None if is_directory(target) else receiver_of(card)
    if not receiver:
        return ""
    library = receiver.call.partition(".")[0]
    if receiver.impossible:
        fields = ", ".join(receiver.impossible)
        return (
            f"{library} cannot make this network, which differs from its"
            f" {card.network} in {fields}; only resnet_jax loads this file."
        )
    if not receiver.model_args:
        return ""
    beside = ""
    if library == "timm":
        beside = f" The arguments are in {_config_path(path_of(target)).name} as well."
    return f"{library} loads it into {receiver.call}.{beside}"


def _config_path(path: Path) -> Path:
    """Returns the path of timm's config of a file.

    A file with a name of the Hugging Face hub has the hub's name for it.
    """
    if path.name in hub.FILES:
        return path.with_name("config.json")
    return path.with_name(path.name + ".config.json")


def is_directory(target: str) -> bool:
    """Returns whether a path names a weights directory rather than a file.

    Raises UserError if the path cannot be looked up.
    """
    path = path_of(target)
    with storage.explaining_errors(path):
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
