"""Converts a network's variables between a tree per block and stacked blocks.

With `scan_blocks=True` the variables of consecutive blocks of equal shape are stacked
along a new first axis, such as `stage1_block2to18`. With `scan_blocks=False` each block
has a tree of its own, such as `stage1_block2`.
"""

import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.models.resnet import runs_of
from resnet_jax.models.spec import ResNetSpec, plan_blocks
from resnet_jax.models.zoo import Spec


def applies(spec: Spec) -> bool:
    """Returns whether a network has blocks that can be scanned."""
    return bool(_runs(spec))


def stack_blocks(variables: Mapping, spec: Spec) -> dict:
    """Returns variables in the layout of `scan_blocks=True`.

    Args:
      variables: The collections such as `params`, each with a tree per block. Any
        trees of this structure, such as gradients, are converted as well. Networks
        without blocks to scan, and stacked blocks, stay as they are.
      spec: The network that the variables belong to.

    Examples:
      >>> from resnet_jax.models import get_spec
      >>> blocks = {f"stage1_block{i}": {"x": np.ones(2)} for i in (1, 2, 3)}
      >>> spec = get_spec("cifar_resnet20")
      >>> stacked = stack_blocks({"params": blocks}, spec)["params"]
      >>> {name: tree["x"].shape for name, tree in stacked.items()}
      {'stage1_block1to3': (3, 2)}
    """

    def convert(blocks: dict, name: str, members: list[str]) -> None:
        trees = [blocks.pop(member) for member in members]
        blocks[name] = jax.tree.map(
            lambda *leaves: _numpy(leaves).stack(leaves), *trees
        )

    return _convert(variables, spec, convert, lambda name, members: members[0])


def unstack_blocks(variables: Mapping, spec: Spec) -> dict:
    """Returns variables in the layout of `scan_blocks=False`.

    Args:
      variables: The collections, in the layout of `scan_blocks=True`; variables in the
        other layout stay as they are.
      spec: The network that the variables belong to.
    """

    def convert(blocks: dict, name: str, members: list[str]) -> None:
        tree = blocks.pop(name)
        for i, member in enumerate(members):
            blocks[member] = jax.tree.map(lambda leaf, i=i: leaf[i], tree)

    return _convert(variables, spec, convert, lambda name, members: name)


def _convert(
    variables: Mapping, spec: Spec, convert: Callable, needed: Callable
) -> dict:
    converted = {}
    for collection, blocks in variables.items():
        converted[collection] = blocks = dict(blocks)
        for name, members in _runs(spec).items():
            # Networks without batch norm have no statistics.
            if needed(name, members) in blocks:
                convert(blocks, name, members)
    return converted


def _numpy(leaves: tuple) -> types.ModuleType:
    return np if isinstance(leaves[0], np.ndarray) else jnp


def _runs(spec: Spec) -> dict[str, list[str]]:
    """Returns the name of each run of scanned blocks, with its blocks' names."""
    if not isinstance(spec, ResNetSpec):
        return {}
    runs = {}
    for i, stage in enumerate(plan_blocks(spec), 1):
        first = 1
        for run in runs_of(stage):
            last = first + len(run) - 1
            if len(run) > 1:
                members = [f"stage{i}_block{j}" for j in range(first, last + 1)]
                runs[f"{members[0]}to{last}"] = members
            first = last + 1
    return runs
