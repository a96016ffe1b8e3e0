"""Finds the tensors of a network among those of a file, by names and shapes alone.

A file may hold more than a network's weights: an optimizer, an EMA, the second encoder
and the projection head of self-supervised training. All names of one network then
have a prefix in common, such as `state_dict.module.encoder_q.`, and the prefixes under
which all names of the expected network exist are found here.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from resnet_jax.errors import UserError
from resnet_jax.models.baselines import HighwaySpec, VGGSpec
from resnet_jax.models.spec import plan_blocks
from resnet_jax.models.zoo import Spec
from resnet_jax.weights.adapt import FIRST_CONVS
from resnet_jax.weights.naming import (
    Scheme,
    Shapes,
    check_shapes,
    is_same_shape,
    shapes_of,
)

# The parts of names that torch's wrappers of modules add at any depth.
WRAPPERS = re.compile(
    r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Tensors that belong to the training and not to a network.
TRAINING = re.compile(
    r".*(optim|sched|scaler|rng|n_averaged|momentum_buffer|exp_avg)|opts?\b|state\.\d"
)

EMA = re.compile(r"(?<![a-z])(ema|swa|averaged)(?![a-z])")
TEACHER = re.compile(r"teacher")
# The networks that self-supervised methods train beside the one that they publish.
SECOND = re.compile(r"student|momentum|target|(encoder|backbone|net|model)_?k\b|key_")


# Modules by which files of other networks are recognised.
OTHER_NETWORKS = (
    (r"(^|[./])(lora_|adapter_)|lora_(A|B|up|down)", "has changes of a network (LoRA)"),
    (r"zero_point|_packed_params|qweight|quant_", "has a quantised network"),
    (r"relative_position_bias", "has a Swin transformer"),
    (
        r"(cls|class)_token|class_embedding|pos(ition)?_embed|patch_embed|encoder_layer_",
        "has a vision transformer",
    ),
    (
        r"stages\.\d\.blocks\.\d+\.(conv_dw|gamma)|\.(dwconv|pwconv1)\b",
        "has a ConvNeXt",
    ),
    (
        r"conv_stem|_conv_head|\.conv_(pw|dw)\b|depthwise",
        "has a MobileNet or an EfficientNet",
    ),
    (r"denseblock", "has a DenseNet"),
    (r"inception|Mixed_\d", "has an Inception network"),
    (r"trunk_output|\bs\d\.b\d+\.", "has a RegNet"),
)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The tensors of a file that belong to a network.

    Attributes:
      prefix: The text before the network's names in the file.
      spec: The network, with the numbers of classes and input channels of the file.
        Without a usable head it has 0 classes.
      names: The name in the file of each tensor, by its name in the scheme.
      adopted_head: The module beside the network that is its head, or "".
      missing: The number of the network's tensors that the file does not have.
      left_out: The names in the file of tensors that belong to other modules.
      others: The prefixes of other networks in the file that fit as well.
    """

    prefix: str
    spec: Spec
    names: Mapping[str, str]
    adopted_head: str
    missing: int
    left_out: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def rank(self) -> tuple[int, int]:
        """Orders the networks that fit a file; the lowest one fits best."""
        head = 2 if not self.spec.num_classes else 1 if self.adopted_head else 0
        return head, len(self.left_out)


def flatten(content: Mapping, kind: type) -> dict:
    """Returns all values of one type in nested mappings, by their joined keys.

    A mapping that is in several places counts once.

    Args:
      content: The mappings, such as the checkpoint of a training program.
      kind: The type of the values.

    Examples:
      >>> flatten({"epoch": 3, "model": {"fc.bias": 0.5}}, float)
      {'model.fc.bias': 0.5}
    """
    seen = set()

    def visit(content: Mapping, prefix: str) -> Iterator[tuple[str, Any]]:
        # A pickle may hold one mapping in many places, even in itself.
        if id(content) in seen:
            return
        seen.add(id(content))
        for key, value in content.items():
            if isinstance(value, kind):
                yield f"{prefix}{key}", value
            elif isinstance(value, Mapping):
                yield from visit(value, f"{prefix}{key}.")

    return dict(visit(content, ""))


def without_wrappers(name: str) -> str:
    """Returns a tensor's name without the modules that torch's wrappers add.

    Examples:
      >>> without_wrappers("layer1._orig_mod.0.conv1.weight")
      'layer1.0.conv1.weight'
    """
    return WRAPPERS.sub("", name)


def select(
    shapes: Shapes, spec: Spec, scheme: Scheme, prefix: str | None = None
) -> list[Selection]:
    """Returns the parts of a file that may be a network, the preferred one first.

    Parts with all names of the network's backbone come first. Among these an EMA is
    preferred to the weights themselves, the network that a self-supervised method
    publishes to the other one (a teacher to its student, `encoder_q` to `encoder_k`),
    and a shorter prefix to a longer one.

    Args:
      shapes: The shape of each tensor of the file.
      spec: The expected network, with any numbers of classes and input channels.
      scheme: The expected naming scheme.
      prefix: The only prefix to take, without its last separator. None: any.
    """
    try:
        names = scheme.names(dataclasses.replace(spec, num_classes=0))
    except UserError:
        # The scheme has no names for such a network.
        return []
    known = set(names.values())
    counts: collections.Counter[str] = collections.Counter()
    for name in shapes:
        for suffix in _suffixes(name):
            if suffix in known:
                counts[name.removesuffix(suffix)] += 1
    # Parts of a network may begin like one, with a `conv1.weight` of their own, so only
    # the prefixes with the most names count.
    most = max(counts.values(), default=0)
    prefixes = sorted((p for p in counts if counts[p] == most), key=_preference)
    if prefix is not None:
        prefixes = [p for p in counts if p.rstrip("./") == prefix.rstrip("./")]
    others = prefixes if most == len(known) else []
    return [_select(shapes, spec, scheme, p, others) for p in prefixes]


def problem_of(selection: Selection, shapes: Shapes, scheme: Scheme) -> str | None:
    """Returns the reason for which selected tensors do not fit the network, or None."""
    own = {name: shapes[stored] for name, stored in selection.names.items()}
    try:
        check_shapes(own, selection.spec, scheme)
    except UserError as error:
        return str(error)
    return None


def may_fit(shapes: Shapes, spec: Spec, params: int, scheme: Scheme) -> bool:
    """Returns False if a network with so many parameters cannot be in a file.

    This rules out most networks of the zoo without tracing them for their names.

    Args:
      shapes: The shape of each tensor of the file.
      spec: The network as the zoo has it.
      params: The number of its parameters.
      scheme: The naming scheme.
    """
    path = f"{FIRST_CONVS[type(spec)]}/kernel"
    rules = scheme.rules(spec)
    first = scheme.name_of(path, rules)
    root, roots = head_root(spec, scheme), _roots(spec, scheme)
    head_params = spec.num_classes * (_features(spec) + 1)
    statistics = tuple(
        scheme.separator + scheme.leaves[leaf]
        for leaf in ("mean", "var")
        if leaf in scheme.leaves
    )
    for name, shape in shapes.items():
        prefix = name.removesuffix(first)
        if prefix == name or prefix[-1:] not in ("", ".", "/") or len(shape) != 4:
            continue
        count = 0
        for other, other_shape in shapes.items():
            own = other.removeprefix(prefix)
            if (
                other.startswith(prefix)
                and not own.startswith(root)
                and _is_known(own, roots, scheme)
                and not re.fullmatch(scheme.ignored, own)
                and not own.endswith(statistics)
            ):
                count += math.prod(other_shape)
        channels = shape[scheme.layout(path, 4).axes.index(2)]
        per_channel = math.prod(shape) // channels if channels else 0
        more = (channels - spec.in_channels) * per_channel
        if count == params - head_params + more:
            return True
    return False


def _features(spec: Spec) -> int:
    """Returns the number of the head's inputs."""
    if isinstance(spec, VGGSpec):
        return spec.hidden
    if isinstance(spec, HighwaySpec):
        return spec.widths[-1][-1]
    return spec.final_width or plan_blocks(spec)[-1][-1].features


def looks_like(shapes: Shapes) -> str:
    """Returns what a file has if it is a known kind of other content, otherwise ""."""
    if not shapes:
        return "has no tensors"
    if all(TRAINING.match(name) for name in shapes):
        return "has the state of an optimizer and no network"
    for pattern, content in OTHER_NETWORKS:
        if name := next((name for name in shapes if re.search(pattern, name)), None):
            return f"{content}, to judge by {name!r}"
    return ""


def describe(shapes: Shapes) -> str:
    """Returns the number of a file's tensors and the names of some of them."""
    names = ", ".join(map(repr, list(shapes)[:3]))
    return f"has {len(shapes)} tensors ({names}{' ...' if len(shapes) > 3 else ''})"


def _preference(prefix: str) -> tuple:
    second = bool(SECOND.search(prefix))
    return (
        not EMA.search(prefix),
        second,
        not TEACHER.search(prefix),
        len(re.findall(r"[./]", prefix)),
    )


def _select(
    shapes: Shapes, spec: Spec, scheme: Scheme, prefix: str, prefixes: list[str]
) -> Selection:
    inside = {
        name.removeprefix(prefix): shape
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }
    spec = _with_channels(spec, inside, scheme)
    headless = dataclasses.replace(spec, num_classes=0)
    backbone = set(scheme.names(headless).values())
    with_head = _with_head(spec, inside, scheme)
    own = set(scheme.names(with_head or headless).values())
    root, roots = head_root(spec, scheme), _roots(spec, scheme)
    # All tensors in the network's own modules are taken as the network's, so that a
    # surplus one is reported.
    names = {
        name: prefix + name
        for name in inside
        if not re.fullmatch(scheme.ignored, name)
        and (
            name in own
            or (not name.startswith(root) and _is_known(name, roots, scheme))
        )
    }
    others = tuple(p for p in prefixes if p != prefix)
    used = set(names.values())

    def is_other(name: str) -> bool:
        for other in others:
            own = name.removeprefix(other)
            if name.startswith(other) and (
                # Another network's part may hold this network's.
                not prefix.startswith(other)
                or own.startswith(root)
                or _is_known(own, roots, scheme)
            ):
                return True
        return False

    left_out = [
        name
        for name in shapes
        if name not in used
        and not is_other(name)
        and not re.fullmatch(scheme.ignored, name)
        and not TRAINING.match(name)
    ]
    adopted = ""
    if not with_head and (
        found := _linear_head(left_out, prefix, shapes, headless, scheme)
    ):
        with_head, adopted, tensors = found
        names |= tensors
        left_out = [name for name in left_out if name not in tensors.values()]
    return Selection(
        prefix=prefix,
        spec=with_head or headless,
        names=names,
        adopted_head=adopted,
        missing=len(backbone - names.keys()),
        left_out=tuple(left_out),
        others=others,
    )


def _with_channels(spec: Spec, shapes: Shapes, scheme: Scheme) -> Spec:
    """Returns the spec with the number of input channels of the first kernel."""
    path = f"{FIRST_CONVS[type(spec)]}/kernel"
    shape = shapes.get(scheme.name_of(path, scheme.rules(spec)), ())
    layout = scheme.layout(path, 4)
    if len(shape) != 4:
        return spec
    channels = shape[layout.axes.index(2)]
    return dataclasses.replace(spec, in_channels=channels)


def head_root(spec: Spec, scheme: Scheme) -> str:
    """Returns the beginning of the names that only the head has.

    Args:
      spec: The network.
      scheme: The naming scheme.

    Examples:
      >>> from resnet_jax.models import get_spec
      >>> from resnet_jax.weights import SCHEMES
      >>> head_root(get_spec("resnetv2_50"), SCHEMES["timm_v2"])
      'head.'
      >>> head_root(get_spec("vgg19"), SCHEMES["vgg"])
      'classifier.6.'
    """
    rules = scheme.rules(spec)
    others = tuple(template for pattern, template in rules if pattern != "head")
    *modules, _ = scheme.name_of("head/kernel", rules).split(scheme.separator)
    root = ""
    for module in modules:
        root += module + scheme.separator
        if not any(other.startswith(root) for other in others):
            break
    return root


def _with_head(spec: Spec, shapes: Shapes, scheme: Scheme) -> Spec | None:
    """Returns the spec with the classes of the head; None if no head fits."""
    stem = _root(scheme.name_of("head/kernel", scheme.rules(spec)))
    for name, shape in shapes.items():
        if _root(name) != stem:
            continue
        for classes in set(shape):
            target = dataclasses.replace(spec, num_classes=classes)
            rules = scheme.rules(target)
            # The name of a head may contain the number of classes.
            if scheme.name_of("head/kernel", rules) == name and all(
                is_same_shape(shapes.get(scheme.name_of(path, rules)), expected)
                for path, expected in _head_shapes(target, scheme).items()
            ):
                return target
    return None


def _head_shapes(spec: Spec, scheme: Scheme) -> Shapes:
    """Returns the foreign shapes of the head's variables by their native names."""
    return {
        path: scheme.layout(path, len(shape)).shape(shape)
        for path, shape in shapes_of(spec).items()
        if path.startswith("head/")
    }


def _linear_head(
    rest: list[str], prefix: str, shapes: Shapes, spec: Spec, scheme: Scheme
) -> tuple[Spec, str, dict[str, str]] | None:
    """Returns the head if a single linear layer follows a backbone in the file.

    Returns:
      The spec with its classes, the layer's name in the file, and the names in the
      file of its tensors by their names in the scheme.
    """
    # Beside the modules of torch's networks, a linear layer may be anything.
    rest = [x for x in rest if not x.startswith(prefix) or scheme.separator == "/"]
    modules = {name.rpartition(scheme.separator)[0] for name in rest}
    shared = {module: _shared(module, prefix) for module in modules}
    beside = [m for m in modules if shared[m] == max(shared.values())]
    if len(beside) != 1:
        return None
    kernel = shapes.get(beside[0] + scheme.separator + scheme.leaves["kernel"], ())
    for classes in set(kernel):
        target = dataclasses.replace(spec, num_classes=classes)
        rules = scheme.rules(target)
        tensors = {}
        for path, expected in _head_shapes(target, scheme).items():
            name = scheme.name_of(path, rules)
            leaf = name.rpartition(scheme.separator)[2]
            tensors[name] = beside[0] + scheme.separator + leaf
            if not is_same_shape(shapes.get(tensors[name]), expected):
                break
        else:
            if sum(name.startswith(beside[0]) for name in rest) == len(tensors):
                return target, beside[0], tensors
    return None


def _shared(name: str, prefix: str) -> int:
    """Returns the number of a prefix's modules that a name begins with."""
    count = 0
    for ours, theirs in zip(
        re.split("[./]", name), re.split("[./]", prefix), strict=False
    ):
        if ours != theirs:
            break
        count += 1
    return count


def _suffixes(name: str) -> Iterable[str]:
    yield name
    for match in re.finditer("[./]", name):
        yield name[match.end() :]


def _roots(spec: Spec, scheme: Scheme) -> set[str]:
    """Returns the first modules of a scheme's names but the head's, without numbers."""
    modules = {
        template.split(scheme.separator)[0]
        for pattern, template in scheme.rules(spec)
        if pattern != "head"
    }
    return {"*" if module == "{module}" else _root(module) for module in modules}


def _is_known(name: str, roots: set[str], scheme: Scheme) -> bool:
    return "*" in roots or _root(name.split(scheme.separator)[0]) in roots


def _root(module: str) -> str:
    return re.sub(r"\d+|\{.*?\}", "", module)


def groups(names: Iterable[str], prefix: str) -> dict[str, int]:
    """Returns the number of tensors in each module beside or inside of a network.

    Args:
      names: The names in a file of tensors that are left out.
      prefix: The prefix of the network in the file.

    Examples:
      >>> groups(["m.head.0.bias", "m.head.2.bias", "m.net.queue"], "m.net.")
      {'m.head': 2, 'm.net.queue': 1}
    """
    counts: collections.Counter[str] = collections.Counter()
    for name in names:
        parts = re.split("([./])", name)
        counts["".join(parts[: 2 * _shared(name, prefix) + 1])] += 1
    return dict(counts)
