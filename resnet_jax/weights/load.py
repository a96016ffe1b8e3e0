"""From a file, a workdir or the hub to variables that a network takes."""

import dataclasses
import functools
import logging
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from resnet_jax.errors import UserError, nearest
from resnet_jax.models import zoo
from resnet_jax.models.zoo import ZOO, Spec, get_entry, get_spec, resolve
from resnet_jax.persistence.storage import explaining_errors, path_of
from resnet_jax.weights import SCHEMES, files, hub, native
from resnet_jax.weights.adapt import FIRST_CONVS, fit_ends
from resnet_jax.weights.bit import BIT
from resnet_jax.weights.card import Card, default_card
from resnet_jax.weights.naming import Scheme, from_theirs, shapes_of

log = logging.getLogger(__name__)

# What the shapes of the head and of the first kernel say.
ENDS = ("num_classes", "in_channels")
# Fields of a spec that may differ between the network whose weights they were and the
# one that takes them: head and first kernel are adapted, and the others do not say
# what function of the weights a network is.
MAY_DIFFER = (
    *(*ENDS, "output_stride"),
    *("zero_init_last", "conv_init", "head_init_std", "head_bias", "gate_bias"),
    *("norm_momentum", "norm_unbiased"),
    *("dropout", "block_dropout", "drop_path", "drop_path_by"),
)

Tensors = Mapping[str, np.ndarray]


def load(
    where: str, *, model: str | None = None, seed: int = 0, **overrides
) -> tuple[Card, dict]:
    """Returns the card and the float32 variables of weights.

    The first kernel is adapted to another number of input channels, and a head of
    another number of classes is drawn afresh, which a warning tells.

    Args:
      where: a file, a weights directory, a workdir or `timm:NAME.TAG`.
      model: the network's name in the zoo; None: what the weights' card says, or else
        the first network of the zoo that they fit.
      seed: of a fresh head, which is the one that a run with that seed would have.
      **overrides: fields of the network's spec to replace, such as `num_classes=10`.

    Raises:
      UserError: there are no such weights, they cannot be read, or are not those of
        the network.
    """
    card, variables = read(where, model=model, **overrides)
    spec = card.make_spec()
    wanted = {key: overrides[key] for key in ENDS if key in overrides}
    target = dataclasses.replace(spec, **wanted)
    variables = fit_ends(variables, spec, target, seed=seed, where=where)
    return card.for_spec(target), variables


def read(where: str, *, model: str | None = None, **overrides) -> tuple[Card, dict]:
    """Returns card and float32 variables of weights, with the head and input they have.

    Arguments and what is raised are as in `load`.
    """
    card, tensors = _read(where, model, overrides)
    try:
        return card, from_theirs(tensors, card.make_spec(), _scheme_of(card))
    except UserError as error:
        raise UserError(f"{where} does not fit {card.network}: {error}") from None


def schemes_of(network: str, suffix: str) -> list[Scheme]:
    """The naming schemes of a network's weights in a format; the first is the usual."""
    entry = get_entry(network)
    if suffix in files.KERAS:
        return [SCHEMES[entry.scheme]] if entry.oracle == "keras" else []
    schemes = [SCHEMES[entry.scheme], native.OWN]
    if entry.paper == zoo.BIT:
        schemes.insert(0 if suffix == ".npz" else 1, BIT)
    return schemes


def _scheme_of(card: Card) -> Scheme:
    schemes = {**SCHEMES, native.OWN.name: native.OWN}
    if card.scheme not in schemes:
        hint = nearest(card.scheme, schemes)
        raise UserError(f"There is no naming scheme {card.scheme!r}.{hint}")
    return schemes[card.scheme]


def _read(where: str, model: str | None, overrides: dict) -> tuple[Card, Tensors]:
    """Returns tensors as they are kept, with the card of the network that has them."""
    path = hub.fetch(where) if where.startswith(hub.PREFIX) else path_of(where)
    with explaining_errors(path):
        if (path / hub.WEIGHTS).is_file():
            path /= hub.WEIGHTS
        if native.is_weights_directory(path):
            tensors, card = native.read(path)
        elif native.is_workdir(path):
            tensors, card = native.read_workdir(path)
        elif path.is_dir():
            raise UserError(
                f"{path} is neither a workdir (config.json, checkpoints/) nor a weights"
                f" directory (card.json) nor one of the hub's ({hub.WEIGHTS})."
            )
        else:
            with files.local(path) as path:
                card = files.read_card(path)
                if not card:
                    return _read_without_card(path, model, overrides)
                tensors = files.read(path, card.make_spec(), _scheme_of(card))
    return _check_card(card, where, model, overrides), tensors


def _check_card(card: Card, where: str, model: str | None, overrides: dict) -> Card:
    """Returns the card under the name of the network that is to have the weights.

    Raises UserError if that is another function of the same tensors.
    """
    there = card.make_spec()
    fields = overrides if model else {**card.spec, **overrides}
    name = resolve(model or card.network)
    wanted = get_spec(name, **fields)
    if type(wanted) is not type(there):
        raise UserError(f"{where} holds the weights of {card.network}, not of {name}.")
    # Tensors that miss or do not fit are told by name, which says more.
    if _shapes(wanted) == _shapes(there):
        for key in card.spec:
            theirs, ours = getattr(there, key), getattr(wanted, key)
            if theirs != ours and key not in MAY_DIFFER:
                raise UserError(
                    f"{where} holds the weights of a network with {key}={theirs!r}"
                    f" ({card.network}); {name} has {key}={ours!r}, with which the same"
                    " tensors are another function."
                )
    ends = {key: getattr(there, key) for key in ENDS}
    spec = dataclasses.replace(wanted, **ends)
    return dataclasses.replace(card, network=name, spec=dataclasses.asdict(spec))


def _shapes(spec: Spec) -> dict:
    return shapes_of(dataclasses.replace(spec, num_classes=1, in_channels=1))


def _read_without_card(
    path: pathlib.Path, model: str | None, overrides: dict
) -> tuple[Card, Tensors]:
    """Reads a file that does not say what network it is of."""
    read = _reader(path)
    if model:
        name = resolve(model)
        scheme, tensors = _choose_scheme(path, name, get_spec(name, **overrides), read)
    else:
        name, scheme, tensors = _recognise(path, read)
    spec = get_spec(name, **overrides)
    if ends := _ends(tensors, spec, scheme):
        spec = _with_ends(spec, *ends)
    return default_card(name, spec, scheme=scheme.name, origin=path.name), tensors


def _reader(path: pathlib.Path) -> Callable[[Spec, Scheme], Tensors]:
    """Reads a file: once, unless its names depend on what network is expected."""
    if path.suffix in files.KERAS:
        return functools.partial(files.read, path)
    tensors = files.read(path)
    return lambda spec, scheme: tensors


def _choose_scheme(
    path: pathlib.Path, name: str, spec: Spec, read: Callable
) -> tuple[Scheme, Tensors]:
    """The scheme under which a network's head and first kernel are in a file."""
    schemes = schemes_of(name, path.suffix)
    if not schemes:
        raise UserError(f"{path} is a file of Keras, which has no {name}.")
    for scheme in schemes:
        tensors = read(spec, scheme)
        if _ends(tensors, spec, scheme):
            return scheme, tensors
    # What misses is told later, by its name.
    return schemes[0], read(spec, schemes[0])


def _recognise(path: pathlib.Path, read: Callable) -> tuple[str, Scheme, Tensors]:
    """The first network of the zoo whose tensors are those of a file."""
    found = list(_fitting(path, read))
    if not found:
        tensors = files.read(path)
        names = ", ".join(map(repr, sorted(tensors)[:3]))
        raise UserError(
            f"{path} fits no network of the zoo ({len(tensors)} tensors: {names} ...);"
            " name one (model=NAME, or --model=NAME on a command line) to see which"
            " tensors differ from it."
        )
    if len(found) > 1:
        names = [name for name, *_ in found]
        log.warning(
            "%s fits %s alike and is taken for %s; name another one by model=NAME, or"
            " --model=NAME on a command line.",
            *(path, ", ".join(names), names[0]),
        )
    return found[0]


def _fitting(
    path: pathlib.Path, read: Callable
) -> Iterator[tuple[str, Scheme, Tensors]]:
    for name, entry in ZOO.items():
        for scheme in schemes_of(name, path.suffix):
            try:
                tensors = read(entry.spec, scheme)
            except UserError:
                # It has another number of layers.
                continue
            ends = _ends(tensors, entry.spec, scheme)
            if not ends:
                continue
            head, conv = ends
            spec = _with_ends(entry.spec, head, conv)
            # The names and shapes of a network take longer to find out than the number
            # of its parameters, which the zoo knows.
            more_classes = spec.num_classes - entry.spec.num_classes
            more_channels = spec.in_channels - entry.spec.in_channels
            params = entry.params + more_classes * (head.shape[0] + 1)
            params += more_channels * conv.size // spec.in_channels
            if params == _count(tensors, scheme) and _fits(tensors, spec, scheme):
                yield name, scheme, tensors


def _ends(
    tensors: Tensors, spec: Spec, scheme: Scheme
) -> tuple[np.ndarray, np.ndarray] | None:
    """The head's and the first convolution's kernels in our layout, if they are."""
    rules = scheme.rules(spec)
    ends = []
    for ours, rank in (("head/kernel", 2), (f"{FIRST_CONVS[type(spec)]}/kernel", 4)):
        value = tensors.get(scheme.name_of(ours, rules))
        layout = scheme.layout(ours, rank)
        if value is None or value.ndim != layout.before + rank + layout.after:
            return None
        ends.append(layout.ours(value))
    return tuple(ends)


def _with_ends(spec: Spec, head: np.ndarray, conv: np.ndarray) -> Spec:
    """The spec with as many classes and channels as these kernels have."""
    classes, channels = head.shape[1], conv.shape[2]
    return dataclasses.replace(spec, num_classes=classes, in_channels=channels)


def _count(tensors: Tensors, scheme: Scheme) -> int:
    """Number of parameters, without running statistics."""
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
    """Whether names and shapes are those of a network."""
    names = scheme.names(spec)
    shapes = {
        names[ours]: scheme.layout(ours, len(shape)).shape(shape)
        for ours, shape in shapes_of(spec).items()
    }
    weights = _weights(tensors, scheme)
    return shapes == {name: value.shape for name, value in weights.items()}


def _weights(tensors: Tensors, scheme: Scheme) -> Tensors:
    return {
        name: value
        for name, value in tensors.items()
        if not re.fullmatch(scheme.ignored, name)
    }
