"""Loads weights from a file, a workdir or the hub, as variables of a network."""

import dataclasses
import functools
import logging
import pathlib
from collections.abc import Callable
from typing import Any

from resnet_jax.config import values
from resnet_jax.errors import UserError, nearest
from resnet_jax.models import zoo
from resnet_jax.models.zoo import ZOO, Spec, get_entry, get_spec, resolve
from resnet_jax.persistence.storage import explaining_errors, path_of
from resnet_jax.weights import files, formats, hub, native
from resnet_jax.weights.adapt import FIRST_CONVS, fit_ends
from resnet_jax.weights.card import ENDS, Card, default_card
from resnet_jax.weights.naming import (
    Scheme,
    Shapes,
    Tensors,
    check_buildable,
    from_foreign,
    shapes_of,
)
from resnet_jax.weights.recognition import (
    Selection,
    describe,
    groups,
    looks_like,
    may_fit,
    problem_of,
    select,
    without_wrappers,
)
from resnet_jax.weights.schemes import SCHEMES
from resnet_jax.weights.stored import UnreadableError

log = logging.getLogger(__name__)

Shape = tuple[int, ...]

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
        another network; or the seed is not one that a run may have.
    """
    values.check_value("seed", seed)
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


def read_card(source: str, *, model: str | None = None, **overrides: Any) -> Card:
    """Returns the card that weights have, or that fits a file without one.

    The values of a file's tensors are not read.

    Args:
      source: A file, a weights directory, a workdir or `timm:NAME.TAG`.
      model: The network's name in the zoo, for a file without a card. None: the first
        network of the zoo that the file fits.
      **overrides: Fields of the spec of that network to replace.

    Raises:
      UserError: There are no such weights, or they cannot be read.
    """
    return _open(source, model, overrides)[0]


def schemes_of(network: str, suffix: str) -> list[Scheme]:
    """Returns the naming schemes that a network's weights may have, the default first.

    Args:
      network: The network's name in the zoo.
      suffix: The suffix of the file, which names its format.
    """
    entry = get_entry(network)
    if suffix in files.KERAS:
        return [SCHEMES[entry.scheme]] if entry.oracle == "keras" else []
    schemes = [SCHEMES[entry.scheme], SCHEMES["resnet_jax"]]
    if entry.paper == zoo.BIT:
        schemes.insert(0 if suffix == ".npz" else 1, SCHEMES["bit"])
    return schemes


def _readable_schemes(network: str, suffix: str) -> list[Scheme]:
    """Returns the schemes of `schemes_of` and those that are only read."""
    schemes = schemes_of(network, suffix)
    names = {scheme.name for scheme in schemes}
    return schemes + [x for x in SCHEMES.values() if x.read_for in names]


def _scheme_of(card: Card) -> Scheme:
    if card.scheme not in SCHEMES:
        hint = nearest(card.scheme, SCHEMES)
        raise UserError(
            f"The card of {card.network} names the scheme {card.scheme!r}, which does"
            f" not exist.{hint}"
        )
    return SCHEMES[card.scheme]


def _read(source: str, model: str | None, overrides: dict) -> tuple[Card, Tensors]:
    """Returns weights in their own naming scheme, with the card of their network."""
    card, tensors, report = _open(source, model, overrides)
    card = _check_card(card, _split_prefix(source)[0], model, overrides)
    report()
    return card, tensors


def _open(
    source: str, model: str | None, overrides: dict
) -> tuple[Card, Tensors, Callable[[], None]]:
    """Returns weights with their own card, and a function that logs what is left out.

    The network and the overrides are those of a file without a card.
    """
    source, prefix = _split_prefix(source)
    path = hub.fetch(source) if source.startswith(hub.PREFIX) else path_of(source)
    tensors: Tensors
    with explaining_errors(path):
        for name in (x + end for x in hub.FILES for end in ("", formats.INDEX)):
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
                f" (card.json) nor a copy of the hub's ({' or '.join(hub.FILES)})."
                " Check the path."
            )
        else:
            with files.local(path) as file:
                return _read_file(file, prefix, model, overrides)
    return card, tensors, lambda: None


def _split_prefix(source: str) -> tuple[str, str | None]:
    """Splits `FILE#PREFIX`, which names one of several networks in a file."""
    file, mark, prefix = source.rpartition("#")
    if not mark or "/" in prefix or path_of(source).exists():
        return source, None
    return file, prefix


def _read_file(
    path: pathlib.Path, prefix: str | None, model: str | None, overrides: dict
) -> tuple[Card, Tensors, Callable[[], None]]:
    card = files.read_card(path)
    read_tensors = _reader(path)
    if card:
        scheme, spec = _scheme_of(card), card.make_spec()
        check_buildable(spec, read_tensors(), path)
        selection = _choose(path, card.network, spec, [scheme], read_tensors, prefix)[1]
        card = card.for_spec(selection.spec)
    elif model:
        name = resolve(model)
        spec = get_spec(name, **overrides)
        schemes = _readable_schemes(name, files.format_of(path))
        if not schemes:
            raise UserError(
                f"{path} is a file of Keras, which has no {name}; name another network."
            )
        scheme, selection = _choose(path, name, spec, schemes, read_tensors, prefix)
        card = default_card(name, selection.spec, scheme=scheme.name, origin=path.name)
    else:
        name, scheme, selection = _recognise(path, read_tensors, prefix)
        ends = {key: getattr(selection.spec, key) for key in ENDS}
        spec = get_spec(name, **overrides | ends)
        card = default_card(name, spec, scheme=scheme.name, origin=path.name)
    stored = read_tensors(selection.spec, scheme)
    tensors = {name: stored[own] for name, own in selection.names.items()}
    return card, tensors, functools.partial(_report, path, card.network, selection)


def _report(path: pathlib.Path, network: str, selection: Selection) -> None:
    """Logs what is taken from a file and what is not, where there is a choice."""
    if selection.others:
        log.warning(
            "%s has %d networks that fit %s. The one at %r is taken; choose another"
            " with %s#PREFIX, where PREFIX is %s.",
            *(path, 1 + len(selection.others), network, selection.prefix.rstrip("./")),
            path.name,
            " or ".join(repr(other.rstrip("./")) for other in selection.others),
        )
    if selection.left_out:
        counts = groups(selection.left_out, selection.prefix)
        log.warning(
            "%s has tensors that %s has no place for, which are left out: %s.",
            *(path, network),
            ", ".join(f"{module} ({count})" for module, count in counts.items()),
        )
    if selection.adopted_head:
        log.warning(
            "%s has the head of %s at %r.", path, network, selection.adopted_head
        )


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


def _reader(path: pathlib.Path) -> Callable[..., Tensors]:
    """Returns a function that reads a file for an expected network and scheme.

    The file is read once, unless the names in it depend on the network.
    """
    if files.format_of(path) in files.KERAS:
        return functools.partial(files.read, path)
    tensors = {without_wrappers(name): x for name, x in files.read(path).items()}
    return lambda spec=None, scheme=None: tensors


def _shapes_of(tensors: Tensors) -> Shapes:
    return {name: x.shape for name, x in tensors.items()}


def _choose(
    path: pathlib.Path,
    name: str,
    spec: Spec,
    schemes: list[Scheme],
    read_tensors: Callable,
    prefix: str | None,
) -> tuple[Scheme, Selection]:
    """Returns the scheme and the tensors of a file that are an expected network.

    Raises UserError if there is no such network; the message names a tensor, and the
    network that the file fits, if there is one.
    """
    found = []
    for scheme in schemes:
        shapes = _shapes_of(read_tensors(spec, scheme))
        selections = select(shapes, spec, scheme, prefix)
        found += [(scheme, selection) for selection in selections]
        for selection in selections:
            if problem_of(selection, shapes, scheme) is None:
                return scheme, selection
    tensors = _shapes_of(read_tensors(spec, schemes[0]))
    if prefix is not None and not found:
        places = [
            repr(x.prefix.rstrip("./")) for x in select(tensors, spec, schemes[0])
        ]
        places = places or ["no prefix"]
        raise UserError(
            f"{path} has no network at {prefix!r}; {name} is at {' or '.join(places)}."
        )
    looks = looks_like(tensors)
    if looks or not found:
        expected = schemes[0].name_of(
            f"{FIRST_CONVS[type(spec)]}/kernel", schemes[0].rules(spec)
        )
        raise UserError(
            f"{path} does not fit {name}, which has tensors such as {expected!r}:"
            f" the file {looks or describe(tensors)}."
        )
    scheme, selection = min(found, key=lambda pair: pair[1].missing)
    shapes = _shapes_of(read_tensors(spec, scheme))
    problem = problem_of(selection, shapes, scheme)
    fitting = _names(_fitting(path, read_tensors, prefix))
    hint = f" It fits {' or '.join(fitting)}." if fitting else ""
    raise UserError(f"{path} does not fit {name}: {problem}{hint}")


def _recognise(
    path: pathlib.Path, read_tensors: Callable, prefix: str | None
) -> tuple[str, Scheme, Selection]:
    """Returns the first network of the zoo that the tensors of a file fit."""
    fitting = _fitting(path, read_tensors, prefix)
    if not fitting:
        shapes = _shapes_of(files.read(path))
        raise UserError(
            f"{path} fits no network of the zoo: it"
            f" {looks_like(shapes) or describe(shapes)}. Name a network (model=NAME, or"
            " --model=NAME on a command line) to see which tensors differ."
        )
    if len(names := _names(fitting)) > 1:
        log.warning(
            "%s fits all of %s, and is loaded as %s. Name another one with model=NAME,"
            " or --model=NAME on a command line.",
            *(path, ", ".join(names), names[0]),
        )
    return fitting[0]


def _names(fitting: list[tuple[str, Scheme, Selection]]) -> list[str]:
    return list(dict.fromkeys(name for name, _, _ in fitting))


def _fitting(
    path: pathlib.Path, read_tensors: Callable, prefix: str | None
) -> list[tuple[str, Scheme, Selection]]:
    """Returns the networks of the zoo that fit a file best, of several parts of it.

    A network with its head fits better than one without it, and one with fewer tensors
    left out fits better than one with more.
    """
    fitting = []
    for name, entry in ZOO.items():
        for scheme in _readable_schemes(name, files.format_of(path)):
            try:
                shapes = _shapes_of(read_tensors(entry.spec, scheme))
            except UserError:
                # The network has another number of layers.
                continue
            if not may_fit(shapes, entry.spec, entry.params, scheme):
                continue
            for selection in select(shapes, entry.spec, scheme, prefix):
                if problem_of(selection, shapes, scheme) is None:
                    fitting.append((name, scheme, selection))
                    break
    rank = min((selection.rank for _, _, selection in fitting), default=None)
    return [fit for fit in fitting if fit[2].rank == rank]
