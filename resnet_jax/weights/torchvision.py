"""Names and layouts of torchvision's ResNets, which timm's `resnet*` share.

The networks for CIFAR follow akamaster/pytorch_resnet_cifar10, which differs only in
calling the head `linear`. Tensors are numpy arrays: nothing here needs torch.
"""

import re
from collections.abc import Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_jax.errors import UserError, nearest
from resnet_jax.models.cost import init_shapes
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.spec import ResNetSpec

# Each step of a path in our variables, and what torchvision calls it. Steps that are
# not listed have the same name, but for blocks: `stage2_block1` is `layer2.0`.
STEPS = {
    "stem_conv": "conv1",
    "stem_norm": "bn1",
    "norm1": "bn1",
    "norm2": "bn2",
    "norm3": "bn3",
    "shortcut": "downsample",
    "conv": "0",
    "norm": "1",
    "head": "fc",
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
# By rank: kernels HWIO -> OIHW, the head's (in, out) -> (out, in), vectors unchanged.
TO_TORCH_AXES = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}


def to_torch(variables: Mapping, spec: ResNetSpec) -> dict[str, np.ndarray]:
    """Returns variables under their names and layouts in a torch `state_dict`.

    Args:
      variables: `params`, `batch_stats` or both; trees of the same structure, such as
        gradients, do as well.
      spec: the network they belong to.
    """
    tensors = {}
    for path, value in flatten_dict(variables).items():
        value = np.asarray(value)
        tensors[_torch_name(path, spec)] = value.transpose(TO_TORCH_AXES[value.ndim])
    return tensors


def from_torch(state_dict: Mapping[str, np.ndarray], spec: ResNetSpec) -> dict:
    """Returns the float32 variables `{"params": ..., "batch_stats": ...}`.

    Args:
      state_dict: torchvision's names and layouts; `num_batches_tracked` is ignored.
        A missing, surplus or wrongly shaped tensor raises UserError naming it.
      spec: the network they belong to.
    """
    # The names and shapes of the variables do not depend on the image's size.
    shapes = flatten_dict(init_shapes(ResNet(spec), image_size=32))
    paths = {_torch_name(path, spec): path for path in shapes}
    given = [name for name in state_dict if not name.endswith("num_batches_tracked")]
    for name in given:
        if name not in paths:
            raise UserError(
                f"The network has no place for the tensor {name!r}."
                f"{nearest(name, paths)}"
            )

    variables = {}
    for name, path in paths.items():
        if name not in state_dict:
            raise UserError(f"The tensor {name!r} is missing.{nearest(name, given)}")
        value = np.asarray(state_dict[name], np.float32)
        ours = shapes[path].shape
        axes = TO_TORCH_AXES[len(ours)]
        wanted = tuple(ours[axis] for axis in axes)
        if value.shape != wanted:
            raise UserError(
                f"The tensor {name!r} has the shape {value.shape}, the network needs"
                f" {wanted}."
            )
        variables[path] = value.transpose(np.argsort(axes))
    return unflatten_dict(variables)


def _torch_name(path: tuple[str, ...], spec: ResNetSpec) -> str:
    """Returns the `state_dict` name of a path that starts with its collection."""
    return ".".join(_torch_step(step, spec) for step in path[1:])


def _torch_step(step: str, spec: ResNetSpec) -> str:
    if step == "head" and spec.stem == "cifar":
        return "linear"
    if block := re.fullmatch(r"stage(\d+)_block(\d+)", step):
        return f"layer{block[1]}.{int(block[2]) - 1}"
    return STEPS.get(step, step)
