"""Names of Keras Applications' ResNets, V1 and V2, and of the Keras tutorial's network.

`keras_files.py` reads and writes the files.
"""

import string
from typing import NamedTuple

from resnet_jax.models.spec import ResNetSpec
from resnet_jax.models.zoo import Spec
from resnet_jax.weights.naming import Layout, Rules, Scheme

NORMS = ("norm1", "norm2", "norm3", "shortcut/norm", "stem_norm1", "final_norm")
LEAVES = {
    "kernel": "kernel",
    "bias": "bias",
    "scale": "gamma",
    "mean": "moving_mean",
    "var": "moving_variance",
    **{f"{norm}/bias": "beta" for norm in NORMS},
}

# The variables of each class of layers, in Keras's order.
VARIABLES = {
    "conv2d": ("kernel", "bias"),
    "batch_normalization": ("gamma", "beta", "moving_mean", "moving_variance"),
    "dense": ("kernel", "bias"),
}

# Keras's names of the native layers, in the order in which a Keras model lists them:
# by their distance from the output, and at equal distance in the order of the sum.
V1_BLOCK = {
    "conv1": "1_conv",
    "norm1": "1_bn",
    "conv2": "2_conv",
    "norm2": "2_bn",
    "shortcut/conv": "0_conv",
    "conv3": "3_conv",
    "shortcut/norm": "0_bn",
    "norm3": "3_bn",
}
V2_BLOCK = {
    "norm1": "preact_bn",
    "conv1": "1_conv",
    "norm2": "1_bn",
    "conv2": "2_conv",
    "norm3": "2_bn",
    "shortcut/conv": "0_conv",
    "conv3": "3_conv",
}
TUTORIAL_BLOCK = {
    "conv1": "res{}_branch2a",
    "norm1": "bn{}_branch2a",
    "conv2": "res{}_branch2b",
    "norm2": "bn{}_branch2b",
    "conv3": "res{}_branch2c",
    "shortcut/conv": "res{}_branch1",
    "norm3": "bn{}_branch2c",
    "shortcut/norm": "bn{}_branch1",
}


def _applications(spec: ResNetSpec) -> Rules:
    rules = [("stem_conv1", "conv1_conv"), ("stem_norm1", "conv1_bn")]
    for i, size in enumerate(spec.stage_sizes, 1):
        for j in range(1, size + 1):
            for native, foreign in (V2_BLOCK if spec.preact else V1_BLOCK).items():
                rules.append(
                    (f"stage{i}_block{j}/{native}", f"conv{i + 1}_block{j}_{foreign}")
                )
    return [*rules, ("final_norm", "post_bn"), ("head", "predictions")]


def _tutorial(spec: ResNetSpec) -> Rules:
    rules = [("stem_conv1", "conv1"), ("stem_norm1", "bn_conv1")]
    for i, size in enumerate(spec.stage_sizes, 1):
        for j, letter in enumerate(string.ascii_lowercase[:size], 1):
            for native, foreign in TUTORIAL_BLOCK.items():
                name = foreign.format(f"{i + 1}{letter}")
                rules.append((f"stage{i}_block{j}/{native}", name))
    return [*rules, ("head", f"fc{spec.num_classes}")]


def _layout(path: str, rank: int) -> Layout:
    return Layout(tuple(range(rank)))


# Models that were built on these networks may keep the states of random generators.
IGNORED = r"seed_generator(_\d+)?/.*"
APPLICATIONS = Scheme("keras", _applications, LEAVES, _layout, "/", IGNORED)
TUTORIAL = Scheme("keras_tutorial", _tutorial, LEAVES, _layout, "/", IGNORED)


class Layer(NamedTuple):
    """A layer that has variables.

    Attributes:
      name: The layer's name in Keras.
      kind: The layer's class, as in Keras's automatic names: `conv2d`,
        `batch_normalization` or `dense`.
      variables: The names of its variables, in Keras's order.
    """

    name: str
    kind: str
    variables: tuple[str, ...]


def list_layers(spec: Spec, scheme: Scheme) -> list[Layer]:
    """Lists a network's layers that have variables, in Keras's order."""
    names = set(scheme.names(spec).values())
    layers = []
    for native, foreign in scheme.rules(spec):
        kind = "conv2d"
        if f"{foreign}/gamma" in names:
            kind = "batch_normalization"
        elif native == "head":
            kind = "dense"
        variables = [v for v in VARIABLES[kind] if f"{foreign}/{v}" in names]
        if variables:
            layers.append(Layer(foreign, kind, tuple(variables)))
    return layers
