"""Loads weights from a file, a workdir or the hub, as variables of a network."""

import dataclasses
import functools
import logging
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

from resnet_jax.errors import UserError, nearest
from resnet_jax.models import zoo
from resnet_jax.models.zoo import ZOO, Spec, get_entry, get_spec, resolve
from resnet_jax.persistence.storage import explaining_errors, path_of
from resnet_jax.weights import SCHEMES, files, formats, hub, native
from resnet_jax.weights.adapt import FIRST_CONVS, fit_ends
from resnet_jax.weights.bit import BIT
from resnet_jax.weights.card import Card, default_card
from resnet_jax.weights.naming import (
    Scheme,
    Tensors,
    check_depth,
    from_foreign,
    shapes_of,
)
from resnet_jax.weights.stored import UnreadableError

log = logging.getLogger(__name__)

Shape = tuple[int, ...]

# The fields of a spec that the shapes of the head and of the first kernel determine.
ENDS = ("num_classes", "in_channels")
# The fields in which the specs of the weights and of the network that loads them may
# differ: the head and the first kernel are adapted, and the other fields do not change
# which function of the weights the network computes.
MAY_DIFFER = (
    *(*ENDS, "output_stride"),
    *("zero_init_last", "conv_init", "head_init_std", "head_bias", "gate_bias"),
    *("norm_momentum", "norm_unbiased"),
    *("dropout", "block_dropout", "drop_path", "drop_path_by"),
)


def load(
    source: str, *, model: str | None = None, seed: int = 0, **overrides: Any
) -> tuple[Card, dict]:
    """Returns the card and the float32 variables of weights.

    The first kernel is adapted to another number of input channels. A head of another
    number of classes is randomly initialised. A warning reports each.

    Args:
      source: A file, a weights directory, a workdir or `timm:NAME.TAG`.
      model: The network's name in the zoo. None: the network of the weights' card, or,
        without a card, the first network of the zoo that they fit.
      seed: The seed of a randomly initialised head, which is the head that a run with
        this seed has.
      **overrides: Fields of the network's spec to replace, such as `num_classes=10`.

    Raises:
      UserError: There are no such weights, they cannot be read, or they belong to
        another network.
    """
    card, variables = read(source, model=model, **overrides)
    spec = card.make_spec()
    new_ends = {key: overrides[key] for key in ENDS if key in overrides}
    target = dataclasses.replace(spec, **new_ends)
    variables = fit_ends(variables, spec, target, seed=seed, weights=source)
    return card.for_spec(target), variables


def read(
    source: str, *, model: str | None = None, **overrides: Any
) -> tuple[Card, dict]:
    """Returns the card and the float32 variables of weights, without adapting them.

    The variables keep their own numbers of classes and input channels. The arguments
    and errors are those of `load`.
    """
    card, tensors = _read(source, model, overrides)
    try:
        return card, from_foreign(tensors, card.make_spec(), _scheme_of(card))
    except UnreadableError:
        raise
    except UserError as error:
        raise UserError(f"{source} does not fit {card.network}: {error}") from None


def schemes_of(network: str, suffix: str) -> list[Scheme]:
    """Returns the naming schemes that a network's weights may have, the default first.

    Args:
      network: The network's name in the zoo.
      suffix: The suffix of the file, which names its format.
    """
    entry = get_entry(network)
    if suffix in files.KERAS:
        return [SCHEMES[entry.scheme]] if entry.oracle == "keras" else []
    schemes = [SCHEMES[entry.scheme], native.NATIVE]
    if entry.paper == zoo.BIT:
        schemes.insert(0 if suffix == ".npz" else 1, BIT)
    return schemes


def _scheme_of(card: Card) -> Scheme:
    schemes = {**SCHEMES, native.NATIVE.name: native.NATIVE}
    if card.scheme not in schemes:
        hint = nearest(card.scheme, schemes)
        raise UserError(
            f"The card of {card.network} names the scheme {card.scheme!r}, which does"
            f" not exist.{hint}"
        )
    return schemes[card.scheme]


def _read(source: str, model: str | None, overrides: dict) -> tuple[Card, Tensors]:
    """Returns weights in their own naming scheme, with the card of their network."""
    path = hub.fetch(source) if source.startswith(hub.PREFIX) else path_of(source)
    tensors: Tensors
    with explaining_errors(path):
        for name in (hub.WEIGHTS, hub.WEIGHTS + formats.INDEX):
            if (path / name).is_file():
                path /= name
                break
        if native.is_weights_directory(path):
            tensors, card = native.read(path)
        elif native.is_workdir(path):
            tensors, card = native.read_workdir(path)
        elif path.is_dir():
            raise UserError(
                f"{path} is neither a workdir (checkpoints/) nor a weights directory"
                f" (card.json) nor a copy of the hub's ({hub.WEIGHTS})."
            )
        else:
            with files.local(path) as file:
                file_card = files.read_card(file)
                if not file_card:
                    return _read_without_card(file, model, overrides)
                card = file_card
                tensors = files.read(file, card.make_spec(), _scheme_of(card))
    try:
        check_depth(card.make_spec(), tensors)
    except UserError as error:
        raise UserError(f"{source} does not fit {card.network}: {error}") from None
    return _check_card(card, source, model, overrides), tensors


def _check_card(card: Card, source: str, model: str | None, overrides: dict) -> Card:
    """Returns the card with the network that loads the weights.

    Raises UserError if that network computes another function of the same tensors.
    """
    spec = card.make_spec()
    fields = overrides if model else {**card.spec, **overrides}
    name = resolve(model or card.network)
    target = get_spec(name, **fields)
    if type(target) is not type(spec):
        raise UserError(
            f"{source} has the weights of {card.network}, not of {name}; load them with"
            f" model={card.network}."
        )
    # If the shapes differ, a later error names the tensors, which says more.
    if target != spec and _shapes(target) == _shapes(spec):
        for key in card.spec:
            saved, value = getattr(spec, key), getattr(target, key)
            if saved != value and key not in MAY_DIFFER:
                raise UserError(
                    f"{source} has the weights of a network with {key}={saved!r}"
                    f" ({card.network}), but {name} has {key}={value!r}, which makes"
                    f" another function of the same tensors. Set {key} to"
                    f" {saved!r}."
                )
    ends = {key: getattr(spec, key) for key in ENDS}
    target = dataclasses.replace(target, **ends)
    return dataclasses.replace(card, network=name, spec=dataclasses.asdict(target))


def _shapes(spec: Spec) -> dict:
    return shapes_of(dataclasses.replace(spec, num_classes=1, in_channels=1))


def _read_without_card(
    path: pathlib.Path, model: str | None, overrides: dict
) -> tuple[Card, Tensors]:
    """Reads a file without a card; its tensors must tell which network it is for."""
    read_tensors = _reader(path)
    if model:
        name = resolve(model)
        scheme, tensors = _choose_scheme(
            path, name, get_spec(name, **overrides), read_tensors
        )
    else:
        name, scheme, tensors = _recognise(path, read_tensors)
    spec = get_spec(name, **overrides)
    if ends := _ends(tensors, spec, scheme):
        spec = _with_ends(spec, *ends)
    return default_card(name, spec, scheme=scheme.name, origin=path.name), tensors


def _reader(path: pathlib.Path) -> Callable[[Spec, Scheme], Tensors]:
    """Returns a function that reads a file for an expected network.

    The file is read once, unless the names in it depend on the network.
    """
    if files.format_of(path) in files.KERAS:
        return functools.partial(files.read, path)
    tensors = files.read(path)
    return lambda spec, scheme: tensors


def _choose_scheme(
    path: pathlib.Path, name: str, spec: Spec, read_tensors: Callable
) -> tuple[Scheme, Tensors]:
    """Returns the scheme in which a file has a network's head and first kernel."""
    schemes = schemes_of(name, files.format_of(path))
    if not schemes:
        raise UserError(
            f"{path} is a file of Keras, which has no {name}; name another network."
        )
    for scheme in schemes:
        tensors = read_tensors(spec, scheme)
        if _ends(tensors, spec, scheme):
            return scheme, tensors
    # A later error names the tensors that are missing.
    return schemes[0], read_tensors(spec, schemes[0])


def _recognise(
    path: pathlib.Path, read_tensors: Callable
) -> tuple[str, Scheme, Tensors]:
    """Returns the first network of the zoo that the tensors of a file fit."""
    fitting = list(_fitting(path, read_tensors))
    if not fitting:
        tensors = files.read(path)
        names = ", ".join(map(repr, sorted(tensors)[:3]))
        raise UserError(
            f"{path} fits no network of the zoo ({len(tensors)} tensors: {names} ...)."
            " Name one (model=NAME, or --model=NAME on a command line) to see which"
            " tensors differ."
        )
    if len(fitting) > 1:
        candidates = [name for name, *_ in fitting]
        log.warning(
            "%s fits all of %s, and is loaded as %s. Name another one with model=NAME,"
            " or --model=NAME on a command line.",
            *(path, ", ".join(candidates), candidates[0]),
        )
    return fitting[0]


def _fitting(
    path: pathlib.Path, read_tensors: Callable
) -> Iterator[tuple[str, Scheme, Tensors]]:
    for name, entry in ZOO.items():
        for scheme in schemes_of(name, files.format_of(path)):
            try:
                tensors = read_tensors(entry.spec, scheme)
            except UserError:
                # The network has another number of layers.
                continue
            ends = _ends(tensors, entry.spec, scheme)
            if not ends:
                continue
            head, conv = ends
            spec = _with_ends(entry.spec, head, conv)
            # The zoo knows the number of parameters, so most networks are ruled out
            # without tracing them for their names and shapes.
            more_classes = spec.num_classes - entry.spec.num_classes
            more_channels = spec.in_channels - entry.spec.in_channels
            params = entry.params + more_classes * (head[0] + 1)
            params += more_channels * math.prod(conv) // spec.in_channels
            if params == _count(tensors, scheme) and _fits(tensors, spec, scheme):
                yield name, scheme, tensors


def _ends(tensors: Tensors, spec: Spec, scheme: Scheme) -> tuple[Shape, Shape] | None:
    """Returns the native shapes of the head's and the first convolution's kernels.

    Returns None if the tensors do not have both.
    """
    rules = scheme.rules(spec)
    ends = []
    for native_name, rank in (
        ("head/kernel", 2),
        (f"{FIRST_CONVS[type(spec)]}/kernel", 4),
    ):
        value = tensors.get(scheme.name_of(native_name, rules))
        layout = scheme.layout(native_name, rank)
        if value is None or value.ndim != layout.before + rank + layout.after:
            return None
        ends.append(layout.native_shape(value.shape))
    head, conv = ends
    return head, conv


def _with_ends(spec: Spec, head: Shape, conv: Shape) -> Spec:
    """Returns the spec with the classes and channels of kernels of these shapes."""
    classes, channels = head[1], conv[2]
    return dataclasses.replace(spec, num_classes=classes, in_channels=channels)


def _count(tensors: Tensors, scheme: Scheme) -> int:
    """Returns the number of parameters, without running statistics."""
    statistics = tuple(
        scheme.separator + scheme.leaves[leaf]
        for leaf in ("mean", "var")
        if leaf in scheme.leaves
    )
    return sum(
        value.size
        for name, value in _weights(tensors, scheme).items()
        if not name.endswith(statistics)
    )


def _fits(tensors: Tensors, spec: Spec, scheme: Scheme) -> bool:
    """Returns whether tensors have the names and shapes of a network."""
    names = scheme.names(spec)
    shapes = {
        names[native_name]: scheme.layout(native_name, len(shape)).shape(shape)
        for native_name, shape in shapes_of(spec).items()
    }
    weights = _weights(tensors, scheme)
    return shapes == {name: value.shape for name, value in weights.items()}


def _weights(tensors: Tensors, scheme: Scheme) -> Tensors:
    return {
        name: value
        for name, value in tensors.items()
        if not re.fullmatch(scheme.ignored, name)
    }
