"""Names of BiT's `.npz` files (Kolesnikov et al. 2019, arXiv:1912.11370)."""

from resnet_jax.models.spec import ResNetSpec
from resnet_jax.weights.naming import Layout, Rules, Scheme

LEAVES = {"kernel": "kernel", "scale": "gamma", "bias": "beta", "head/bias": "bias"}
CONV = "standardized_conv2d"


def _rules(spec: ResNetSpec) -> Rules:
    unit = "resnet/block{i}/unit{j:0>2}"
    block = r"stage(?P<i>\d+)_block(?P<j>\d+)"
    rules = [
        ("stem_conv1", f"resnet/root_block/{CONV}"),
        (f"{block}/shortcut/conv", f"{unit}/a/proj/{CONV}"),
        ("final_norm", "resnet/group_norm"),
        ("head", "resnet/head/conv2d"),
    ]
    for k, letter in enumerate("abc", 1):
        rules += [
            (f"{block}/conv{k}", f"{unit}/{letter}/{CONV}"),
            (f"{block}/norm{k}", f"{unit}/{letter}/group_norm"),
        ]
    return rules


def _layout(path: str, rank: int) -> Layout:
    if path == "head/kernel":
        # BiT's head is a 1x1 convolution, HWIO.
        return Layout((0, 1), before=2)
    return Layout(tuple(range(rank)))


BIT = Scheme("bit", _rules, LEAVES, _layout, separator="/", ignored="")
