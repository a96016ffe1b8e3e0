"""The two layouts of a network's variables: a tree for each block, or stacked.

With `scan_blocks=True` a run of blocks that are alike keeps its variables stacked along
a new first axis, `stage1_block2to18`; else each block has its own, `stage1_block2`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.models.resnet import runs_of
from resnet_jax.models.spec import ResNetSpec, plan_blocks
from resnet_jax.models.zoo import Spec


def applies(spec: Spec) -> bool:
    """Whether a network has blocks that can be scanned."""
    return bool(_runs(spec))


def stack_blocks(variables: Mapping, spec: Spec) -> dict:
    """Returns variables in the layout of `scan_blocks=True`.

    Args:
      variables: collections such as `params`, a tree for each block; any trees of the
        same structure, such as gradients, do as well.
      spec: the network.
    """

    def convert(blocks: dict, name: str, members: list[str]) -> None:
        trees = [blocks.pop(member) for member in members]
        blocks[name] = jax.tree.map(
            lambda *leaves: _numpy(leaves).stack(leaves), *trees
        )

    return _convert(variables, spec, convert, lambda name, members: members[0])


def unstack_blocks(variables: Mapping, spec: Spec) -> dict:
    """Returns variables in the layout of `scan_blocks=False`; see `stack_blocks`."""

    def convert(blocks: dict, name: str, members: list[str]) -> None:
        tree = blocks.pop(name)
        for i, member in enumerate(members):
            blocks[member] = jax.tree.map(lambda leaf, i=i: leaf[i], tree)

    return _convert(variables, spec, convert, lambda name, members: name)


def _convert(variables: Mapping, spec: Spec, convert: Callable, needed: Callable):
    converted = {}
    for collection, blocks in variables.items():
        converted[collection] = blocks = dict(blocks)
        for name, members in _runs(spec).items():
            # Networks without batch norm have no statistics.
            if needed(name, members) in blocks:
                convert(blocks, name, members)
    return converted


def _numpy(leaves):
    return np if isinstance(leaves[0], np.ndarray) else jnp


def _runs(spec: Spec) -> dict[str, list[str]]:
    """The name of each run of blocks that are scanned, with its blocks' names."""
    if not isinstance(spec, ResNetSpec):
        return {}
    found = {}
    for i, stage in enumerate(plan_blocks(spec), 1):
        first = 1
        for run in runs_of(stage):
            last = first + len(run) - 1
            if len(run) > 1:
                members = [f"stage{i}_block{j}" for j in range(first, last + 1)]
                found[f"{members[0]}to{last}"] = members
            first = last + 1
    return found
