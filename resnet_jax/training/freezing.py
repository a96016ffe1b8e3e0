"""Freezes parameters and batch-norm statistics, which a train step does not change.

What is frozen has an `optax.MaskedNode`, a tree without leaves, in place of its array.
So gradients and the optimiser's state have no arrays of it, and all other names stay.
"""

import contextlib
import dataclasses
import fnmatch
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from resnet_jax.config.durations import to_steps
from resnet_jax.errors import UserError, nearest
from resnet_jax.models.cost import init_shapes
from resnet_jax.models.scan import stack_blocks

Tree = Any
ALL_BUT_HEAD = "all_but_head"


def _is_masked(tree: Any) -> bool:
    return isinstance(tree, optax.MaskedNode)


@dataclasses.dataclass(frozen=True)
class Frozen:
    """The part of a network's variables that is frozen.

    Attributes:
      leaves: The path of each frozen array in `params` or `batch_stats`, such as
        `("stage1_block1", "norm1", "mean")`. With `scan_blocks` it has the paths of
        merged blocks and those of single ones, which some optimisers see.
      norms: The path of each module whose running statistics are frozen.
    """

    leaves: frozenset[tuple[str, ...]] = frozenset()
    norms: frozenset[tuple[str, ...]] = frozenset()

    def trained(self, tree: Tree) -> Tree:
        """Returns `params`, `batch_stats` or a tree like them without frozen arrays."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: optax.MaskedNode() if self._has(path) else x, tree
        )

    def merge(self, trained: Tree, tree: Tree) -> Tree:
        """Returns the arrays of `trained`, and of `tree` those that are frozen.

        Args:
          trained: A result of `trained`, possibly with new arrays.
          tree: A tree with arrays for all paths.
        """
        return jax.tree.map(
            lambda new, old: old if _is_masked(new) else new,
            *(trained, tree),
            is_leaf=_is_masked,
        )

    def mask(self, tree: Tree) -> Tree:
        """Returns a tree of booleans: true for the frozen arrays."""
        return jax.tree_util.tree_map_with_path(lambda path, _: self._has(path), tree)

    def _has(self, path: tuple) -> bool:
        return tuple(key.key for key in path) in self.leaves

    def applied(self) -> contextlib.AbstractContextManager:
        """Returns a context in which norms with frozen statistics do not train.

        A frozen batch norm normalises by its running statistics, as with
        `trainable=False` in Keras and in timm's `FrozenBatchNormAct2d`.
        """
        if not self.norms:
            return contextlib.nullcontext()

        def call(
            method: Callable,
            args: tuple,
            kwargs: dict,
            context: nn.module.InterceptorContext,
        ) -> Any:
            if context.module.path in self.norms and "train" in kwargs:
                kwargs = {**kwargs, "train": False}
            return method(*args, **kwargs)

        return nn.intercept_methods(call)


NOTHING = Frozen()


def frozen_of(config: ConfigDict, model: nn.Module) -> Frozen:
    """Returns what `config.optim.freeze` freezes.

    Args:
      config: The run's configuration.
      model: The network.

    Raises:
      UserError: A pattern matches nothing, everything is frozen, or only some of the
        blocks that `config.model.scan_blocks` merges.
    """
    if not config.optim.freeze:
        return NOTHING
    # Patterns are matched with the names of single blocks.
    single = model.clone(scan_blocks=False) if config.model.scan_blocks else model
    shapes = init_shapes(single, config.data.image_size)
    params = flatten_dict(dict(shapes["params"]))
    chosen = _chosen(config.optim.freeze, ["/".join(path) for path in params])
    if chosen >= {"/".join(path) for path in params}:
        raise UserError(
            f"optim.freeze={config.optim.freeze} freezes every parameter of"
            f" {config.model.name}, so that nothing is left to train. Freeze fewer, for"
            f" example with optim.freeze={ALL_BUT_HEAD}."
        )

    def is_frozen(path: tuple[str, ...]) -> bool:
        return "/".join(path) in chosen

    # A norm is frozen if all of its parameters are.
    modules = {path[:-1] for path in params if is_frozen(path)}
    modules -= {path[:-1] for path in params if not is_frozen(path)}
    flags = {
        "params": {path: np.array(is_frozen(path)) for path in params},
        "batch_stats": {
            path: np.array(path[:-1] in modules)
            for path in flatten_dict(dict(shapes.get("batch_stats", {})))
        },
    }
    if config.model.scan_blocks:
        trees = {name: unflatten_dict(flat) for name, flat in flags.items()}
        for name, tree in stack_blocks(trees, model.spec).items():
            flags[name] |= flatten_dict(tree)
    for path, flag in (flags["params"] | flags["batch_stats"]).items():
        if flag.any() and not flag.all():
            raise UserError(
                f"optim.freeze={config.optim.freeze} freezes a part of {path[0]}, whose"
                " blocks model.scan_blocks=True merges into one. Freeze all of them, or"
                " set model.scan_blocks=False."
            )
    stats = {path for path, flag in flags["batch_stats"].items() if flag.all()}
    leaves = {path for path, flag in flags["params"].items() if flag.all()}
    return Frozen(frozenset(leaves | stats), frozenset(path[:-1] for path in stats))


def _chosen(freeze: str, names: list[str]) -> set[str]:
    """Returns the names of parameters that `optim.freeze` chooses.

    Args:
      freeze: Words and patterns, separated by commas.
      names: The names of all parameters, such as `stage1_block1/conv1/kernel`.
    """
    parts_of = {name: _parts(name) for name in names}
    # The prefixes of the names up to the stem and up to each stage.
    up_to: dict[str, tuple[str, ...]] = {}
    stages = {int(match[1]) for x in names if (match := re.match(r"stage(\d+)_", x))}
    if any(name.startswith("stem") for name in names):
        up_to["up_to_stem"] = ("stem",)
    for k in sorted(stages):
        up_to[f"up_to_stage{k}"] = ("stem", *(f"stage{i}_" for i in range(1, k + 1)))
    chosen: set[str] = set()
    for part in map(str.strip, freeze.split(",")):
        if part == ALL_BUT_HEAD:
            found = {name for name in names if parts_of[name][0] != "head"}
        elif part in up_to:
            found = {name for name in names if name.startswith(up_to[part])}
        else:
            # A wildcard does not continue a number: stage1* is not stage10_block1.
            marked = re.sub(r"(?<=\d)\*", "\0*", part)
            pattern = fnmatch.translate(marked).replace("\0", r"(?!\d)")
            is_match = re.compile(pattern).match
            found = {name for name in names if any(map(is_match, parts_of[name]))}
        if not found:
            known = dict.fromkeys(
                [ALL_BUT_HEAD, *up_to, *(x for name in names for x in parts_of[name])]
            )
            raise UserError(
                f"optim.freeze={freeze}: no parameter matches {part!r}."
                f"{nearest(part, known)}"
            )
        chosen |= found
    return chosen


def _parts(name: str) -> list[str]:
    """Returns the modules that a parameter is in, from the outermost on, and itself."""
    parts = name.split("/")
    return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]


def frozen_until(config: ConfigDict, train_size: int, total_steps: int) -> int | None:
    """Returns the step before which `optim.freeze` applies; None: the complete run.

    Args:
      config: The run's configuration.
      train_size: The number of training images, the length of an epoch.
      total_steps: The length of the run in steps.
    """
    optim = config.optim
    if not optim.freeze_until:
        return None
    duration, key = optim.freeze_until, "optim.freeze_until"
    until = to_steps(duration, config.batch_size, train_size, key, total_steps)
    return until if until < total_steps else None


class Late(NamedTuple):
    """The state of a transformation for the parameters that thaw during the run.

    Attributes:
      state: The state of the transformation, which starts when they thaw.
    """

    state: Tree


def apart(
    transformation: optax.GradientTransformation, late: Frozen
) -> optax.GradientTransformation:
    """Applies a transformation separately to what thaws and to all other parameters.

    So both have a step counter of their own, which bias corrections need. torch has one
    for each parameter.

    Args:
      transformation: A transformation of each array by itself.
      late: The parameters that thaw.
    """

    def is_early(tree: Tree) -> Tree:
        return jax.tree.map(lambda flag: not flag, late.mask(tree))

    early_part = optax.masked(transformation, is_early)
    late_part = optax.masked(transformation, late.mask)

    def init(params: Tree) -> tuple:
        return early_part.init(params), Late(late_part.init(params))

    def update(updates: Tree, state: tuple, params: Tree = None) -> tuple:
        updates, early_state = early_part.update(updates, state[0], params)
        updates, late_state = late_part.update(updates, state[1].state, params)
        return updates, (early_state, Late(late_state))

    return optax.GradientTransformation(init, update)


def thaw_state(opt_state: Tree, fresh: Tree) -> Tree:
    """Returns the optimiser's state after a thaw.

    Args:
      opt_state: The state before it, without arrays of frozen parameters.
      fresh: The optimiser's first state for all parameters.

    Returns:
      `opt_state`, with the arrays of `fresh` for the parameters that thaw.
    """

    def starts(part: Any) -> bool:
        return _is_masked(part) or isinstance(part, Late)

    return jax.tree.map(
        lambda old, new: new if starts(old) else old,
        *(opt_state, fresh),
        is_leaf=starts,
    )
