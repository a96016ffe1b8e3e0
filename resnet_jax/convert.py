"""Converts weights: `python -m resnet_jax.convert IN OUT`.

IN is what `resnet_jax.weights.load` takes: a file of torchvision, timm, Keras or BiT, a
workdir, a weights directory or `timm:NAME.TAG`. The suffix of OUT says what is written;
without one it is a weights directory.
"""

import argparse
import dataclasses

from resnet_jax import output
from resnet_jax.errors import UserError, nearest
from resnet_jax.storage import Path, path_of
from resnet_jax.weights import files, own
from resnet_jax.weights.card import Card
from resnet_jax.weights.load import load, schemes_of
from resnet_jax.weights.naming import Scheme, to_theirs


def save(target: str, variables: dict, card: Card, to: str | None = None) -> Card:
    """Writes variables as a file or weights directory; returns the card in it.

    Args:
      target: a file, whose suffix says the format, or a directory.
      variables: `params` and `batch_stats`.
      card: of the variables, whatever its scheme.
      to: the naming scheme; None: the network's own, or BiT's in `.npz`.

    Raises:
      UserError: the network has no such names, or the file system refuses.
    """
    path = path_of(target)
    if is_directory(target):
        scheme = own.OWN
        if to not in (None, scheme.name):
            raise UserError(
                f"{path} is to be a directory, which has our names; for those of {to}"
                f" give a file: {', '.join(files.SUFFIXES)}."
            )
        card = dataclasses.replace(card, scheme=scheme.name)
        own.write(path, variables, card)
        return card
    scheme = _choose(path, card, to)
    card = dataclasses.replace(card, scheme=scheme.name)
    files.write(path, to_theirs(variables, card.make_spec(), scheme), card)
    return card


def is_directory(target: str) -> bool:
    """Whether a name is that of a weights directory, not of a file."""
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


def main(argv: list[str]) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m resnet_jax.convert",
        description="Converts weights between frameworks, bit for bit.",
    )
    parser.add_argument("source", metavar="IN", help="file, directory, timm:NAME.TAG")
    parser.add_argument(
        "target",
        metavar="OUT",
        help=f"a file ({', '.join(files.SUFFIXES)}), or a directory in our own format",
    )
    parser.add_argument("--to", help="naming scheme, where OUT may have several")
    parser.add_argument("--model", help="the network, where IN does not say it")
    args = parser.parse_args(argv[1:])
    if not is_directory(args.target):
        files.check_suffix(path_of(args.target))
    card, variables = load(args.source, model=args.model)
    card = save(args.target, variables, card, args.to)
    output.say(
        f"{args.source}: {card.network} -> {args.target} (names of {card.scheme})"
    )


if __name__ == "__main__":
    output.command(main)
