"""Tells how timm, torchvision and Keras make the network of a file that is written.

A file in a library's names loads there only into the same network. The arguments of
the library's function follow from how the network differs from the one that the
library has under its name, and some differences have no arguments.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from resnet_jax.errors import UserError
from resnet_jax.models.spec import ResNetSpec, plan_blocks
from resnet_jax.models.zoo import Spec, build, get_entry
from resnet_jax.weights.card import Card
from resnet_jax.weights.naming import shapes_of

# The arguments of a library's function for a spec, given the spec of its own network.
# The result is None if the library cannot make such a network.
Arguments = Callable[[Any, Any], Mapping[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Receiver:
    """The function of a library that makes the network of a file.

    Attributes:
      call: The call of the function with its arguments, as Python code.
      model_args: The arguments beside the network's name.
      impossible: The fields of the spec that the library cannot change, as
        `name=value`; with any, there is no such call.
    """

    call: str
    model_args: Mapping[str, Any]
    impossible: tuple[str, ...] = ()


def receiver_of(card: Card) -> Receiver | None:
    """Returns how a library makes the network of a card, in the card's scheme.

    Returns None if no library has the network under these names.
    """
    entry, spec = get_entry(card.network), card.make_spec()
    if entry.scheme != card.scheme:
        return None
    if entry.oracle == "timm":
        table = TIMM[entry.scheme]
        call = f"timm.create_model({card.network!r}"
    elif entry.oracle == "torchvision":
        table = TORCHVISION if isinstance(spec, ResNetSpec) else TORCHVISION_VGG
        name = card.network.removeprefix("torchvision_")
        call = f"torchvision.models.{name}("
    elif entry.scheme == "keras":
        table = KERAS
        call = f"keras.applications.{_keras_name(card.network)}(weights=None"
        call += ", classifier_activation=None" if spec.num_classes else ""
    else:
        return None
    model_args: dict[str, Any] = {}
    impossible = []
    for field in changed_fields(spec, entry.spec):
        arguments = table.get(field, _none)(spec, entry.spec)
        if arguments is None:
            impossible.append(f"{field}={getattr(spec, field)!r}")
        else:
            model_args |= arguments
    parts = [f"{key}={value!r}" for key, value in model_args.items()]
    call = ", ".join([call, *parts]).replace("(, ", "(") + ")"
    return Receiver(call, model_args, tuple(impossible))


def timm_config(card: Card, model_args: Mapping[str, Any]) -> str:
    """Returns the `config.json` with which timm makes and loads a card's network.

    Args:
      card: The card of the weights.
      model_args: The arguments of `timm.create_model`.
    """
    spec = card.spec
    side = card.image_size
    config = {
        "architecture": card.network,
        "num_classes": spec["num_classes"],
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [spec["in_channels"], side, side],
            "mean": card.mean,
            "std": card.std,
            "interpolation": card.interpolation,
            "crop_pct": card.crop_fraction,
            "license": card.license or None,
        },
    }
    if card.classes and len(card.classes) == spec["num_classes"]:
        config["label_names"] = card.classes
    return json.dumps(config, indent=2) + "\n"


@functools.cache
def changed_fields(spec: Spec, named: Spec) -> tuple[str, ...]:
    """Returns the fields in which a spec is another network than a named one.

    A field counts if the network with the named one's value has other parameters or
    computes another function in evaluation.

    Examples:
      >>> from resnet_jax.models import get_spec
      >>> spec = get_spec("cifar_resnet20", num_classes=7, se_ratio=0.5, drop_path=0.1)
      >>> changed_fields(spec, get_spec("cifar_resnet20"))
      ('num_classes',)
    """
    program = functools.cache(lambda: _program(spec))

    def matters(field: str) -> bool:
        try:
            other = dataclasses.replace(spec, **{field: getattr(named, field)})
            # Most changes show in the shapes, which are found faster than a program.
            if shapes_of(other) != shapes_of(spec):
                return True
        # Fields such as the stages' sizes and widths can only be changed together.
        except UserError:
            return True
        return _program(other) != program()

    return tuple(
        field.name
        for field in dataclasses.fields(spec)
        if getattr(spec, field.name) != getattr(named, field.name)
        and matters(field.name)
    )


def _program(spec: Spec) -> str:
    """Returns the program that evaluates a network, which tells it from any other."""
    model = build(spec)
    image = jax.ShapeDtypeStruct((1, 64, 64, spec.in_channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return jax.jit(model.apply).lower(variables, image).as_text()


def _none(spec: Any, named: Any) -> None:
    """Returns None: no arguments make such a network."""


def _same(argument: str, field: str) -> Arguments:
    return lambda spec, named: {argument: getattr(spec, field)}


def _four_stages(argument: str, field: str) -> Arguments:
    # timm's networks have four stages.
    def arguments(spec: ResNetSpec, named: ResNetSpec) -> Mapping[str, Any] | None:
        four = len(spec.stage_sizes) == 4
        return {argument: getattr(spec, field)} if four else None

    return arguments


def _v2_layers(spec: ResNetSpec, named: ResNetSpec) -> Mapping[str, Any] | None:
    # timm's functions of BiT's networks take no layers.
    if named.norm == "group" and named.weight_standardization:
        return None
    return _four_stages("layers", "stage_sizes")(spec, named)


def _stem(spec: ResNetSpec, named: ResNetSpec) -> Mapping[str, Any] | None:
    if spec.stem == ((7, 2, 64),):
        return {"stem_type": ""}
    if len(spec.stem) == 3:
        width = spec.stem[1][2]
        for kind, first in (("deep", width), ("deep_tiered", 3 * (width // 4))):
            if spec.stem == ((3, 2, first), (3, 1, width), (3, 1, 2 * width)):
                return {"stem_type": kind, "stem_width": width}
    return None


def _stem_pool(spec: ResNetSpec, named: ResNetSpec) -> Mapping[str, Any] | None:
    replaced = {"max": False, "conv": True}
    if {spec.stem_pool, named.stem_pool} <= replaced.keys():
        return {"replace_stem_pool": replaced[spec.stem_pool]}
    return None


def _attention(spec: ResNetSpec, named: ResNetSpec) -> Mapping[str, Any] | None:
    # timm's functions pass their other arguments of blocks by the same name.
    if spec.spatial != "conv" or named.spatial != "conv":
        return None
    if not spec.attention:
        return {"block_args": {}}
    if spec.attention == "se" and spec.se_ratio != 1 / 16:
        return None
    return {"block_args": {"attn_layer": spec.attention}}


def _norm(spec: ResNetSpec, named: ResNetSpec) -> Mapping[str, Any] | None:
    if spec.norm_epsilon != 1e-5 or spec.norm_groups != 32:
        return None
    layers = {"batch": "batchnorm2d", "group": "groupnorm"}
    return {"norm_layer": layers[spec.norm]} if spec.norm in layers else None


def _output_stride(spec: ResNetSpec, named: ResNetSpec) -> Mapping[str, Any] | None:
    stride = spec.output_stride or 32
    return {"output_stride": stride} if stride in (8, 16, 32) else None


def _dilation(spec: ResNetSpec, named: ResNetSpec) -> Mapping[str, Any] | None:
    stages = {8: [False, True, True], 16: [False, False, True]}
    if spec.output_stride not in stages:
        return None
    return {"replace_stride_with_dilation": stages[spec.output_stride]}


def _channels(spec: ResNetSpec, named: ResNetSpec) -> Mapping[str, Any] | None:
    # timm multiplies the channels by a factor that is part of the name.
    factor = named.widths[0] // 64 if named.norm == "group" else 1
    expansion = 1 if spec.blocks[0].endswith("basic") else spec.expansion
    if len(spec.widths) != 4 or any(width % factor for width in spec.widths):
        return None
    # timm also has projections where a stage keeps the number of channels.
    if _widening(spec) != _widening(named):
        return None
    return {"channels": tuple(expansion * width // factor for width in spec.widths)}


def _widening(spec: ResNetSpec) -> list[bool]:
    """Returns for each stage whether it changes the number of channels."""
    features = [stage[-1].features for stage in plan_blocks(spec)]
    before = [spec.stem[-1][2], *features]
    return [old != new for old, new in zip(before, features, strict=False)]


def _classes(spec: Spec, named: Spec) -> Mapping[str, Any] | None:
    if spec.num_classes:
        return {"classes": spec.num_classes}
    return {"include_top": False, "pooling": "avg"}


def _input_shape(spec: Spec, named: Spec) -> Mapping[str, Any] | None:
    return {"input_shape": (224, 224, spec.in_channels)}


def _some_classes(spec: Spec, named: Spec) -> Mapping[str, Any] | None:
    return {"num_classes": spec.num_classes} if spec.num_classes else None


def _keras_name(network: str) -> str:
    name = network.removeprefix("keras_").replace("resnet", "ResNet")
    return name.replace("v2", "V2")


ENDS = {
    "num_classes": _same("num_classes", "num_classes"),
    "in_channels": _same("in_chans", "in_channels"),
    "output_stride": _output_stride,
}
TIMM: dict[str, dict[str, Arguments]] = {
    "timm": ENDS
    | {
        "stage_sizes": _four_stages("layers", "stage_sizes"),
        "widths": _four_stages("channels", "widths"),
        "groups": _same("cardinality", "groups"),
        "base_width": _same("base_width", "base_width"),
        "reduce_first": _same("block_reduce_first", "reduce_first"),
        "stem": _stem,
        "stem_pool": _stem_pool,
        "shortcut_kernel": _same("down_kernel_size", "shortcut_kernel"),
        "shortcut_pool": _same("avg_down", "shortcut_pool"),
        "activation": _same("act_layer", "activation"),
        "attention": _attention,
        "norm": _norm,
    },
    "timm_v2": ENDS | {"stage_sizes": _v2_layers, "widths": _channels},
    "timm_nf": ENDS
    | {
        "stage_sizes": _four_stages("depths", "stage_sizes"),
        "widths": _channels,
        "final_width": _same("num_features", "final_width"),
    },
}
TORCHVISION: dict[str, Arguments] = {
    "num_classes": _some_classes,
    "groups": _same("groups", "groups"),
    "base_width": _same("width_per_group", "base_width"),
    "output_stride": _dilation,
}
TORCHVISION_VGG: dict[str, Arguments] = {"num_classes": _some_classes}
KERAS: dict[str, Arguments] = {"num_classes": _classes, "in_channels": _input_shape}
