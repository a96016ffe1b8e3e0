"""Naming schemes: pairs of variable names, used to read and to write other files.

A native name is the path of a variable here, such as
`stage2_block1/shortcut/conv/kernel` (without the collection). A foreign name is the
name that another framework gives the same variable. A scheme translates the names of
modules and of their variables, and gives the order of an array's axes.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_jax.errors import UserError, nearest
from resnet_jax.models.cost import init_shapes
from resnet_jax.models.spec import ResNetSpec
from resnet_jax.models.zoo import Spec, build
from resnet_jax.weights.stored import StoredTensor

# A network of this many blocks can be built within seconds.
MANY_BLOCKS = 1000

Rules = list[tuple[str, str]]
Tensors = Mapping[str, np.ndarray | StoredTensor]
Shapes = Mapping[str, tuple[int, ...]]
# The types whose values are weights as they are: integers and float8 need a scale.
FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of axes in which another framework keeps an array.

    Attributes:
      axes: The native axis that each foreign axis is.
      before: The number of axes of length one before them.
      after: The number of axes of length one after them.

    Examples:
      >>> Layout((1, 0), after=2).shape((3, 5))
      (5, 3, 1, 1)
    """

    axes: tuple[int, ...]
    before: int = 0
    after: int = 0

    def to_foreign(self, value: np.ndarray) -> np.ndarray:
        """Converts an array from the native layout."""
        return value.transpose(self.axes).reshape(self.shape(value.shape))

    def to_native(self, value: np.ndarray) -> np.ndarray:
        """Converts an array to the native layout."""
        value = value.reshape(value.shape[self.before : value.ndim - self.after])
        return value.transpose(np.argsort(self.axes))

    def native_shape(self, foreign: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the native shape of an array, from its foreign shape."""
        permuted = foreign[self.before : len(foreign) - self.after]
        return tuple(permuted[i] for i in np.argsort(self.axes))

    def shape(self, native: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the foreign shape of an array, from its native shape."""
        permuted = tuple(native[axis] for axis in self.axes)
        return (1,) * self.before + permuted + (1,) * self.after


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The names that one framework gives to the variables of networks.

    Attributes:
      name: The name of the scheme.
      rules: Returns, for a network's spec, pairs (pattern, template) of module names.
        The first pattern that matches a native name gives the foreign name. Templates
        are formatted with the pattern's groups, and with `i_before` and `i_after` for
        a group `i` that is a number.
      leaves: The foreign names of `kernel`, `bias` and so on. A key may also be a
        longer end of a native name, such as `norm1/bias`; the longest one counts.
      layout: Returns the foreign layout of a native name and its rank.
      separator: The text between the foreign names of a module and of its variable.
      ignored: A pattern of foreign names that are not weights.
      read_for: The name of another scheme, of whose networks files may have these names
        as well. They are only read. Empty: networks have this scheme in the zoo.
    """

    name: str
    # A scheme is for networks of one kind of spec, which its rules take.
    rules: Callable[[Any], Rules]
    leaves: Mapping[str, str]
    layout: Callable[[str, int], Layout]
    separator: str = "."
    ignored: str = r".*num_batches_tracked"
    read_for: str = ""

    def names(self, spec: Spec) -> dict[str, str]:
        """Returns the foreign name of each native name of a network."""
        rules = self.rules(spec)
        return {path: self.name_of(path, rules) for path in shapes_of(spec)}

    def name_of(self, path: str, rules: Rules) -> str:
        """Returns the foreign name of a variable.

        Args:
          path: The native name.
          rules: The rules of the variable's network.

        Raises:
          UserError: No rule matches the name.
        """
        module = path.rpartition("/")[0]
        for pattern, template in rules:
            if match := re.fullmatch(pattern, module):
                name = template.format(**_fields(match))
                return name + self.separator + self._leaf(path)
        raise UserError(
            f"The naming scheme {self.name} has no name for the variable {path}; use"
            " the scheme of the network's own entry in the zoo."
        )

    def _leaf(self, path: str) -> str:
        end = path
        while end not in self.leaves:
            end = end.split("/", 1)[1]
        return self.leaves[end]


def _fields(match: re.Match) -> dict[str, str | int]:
    fields: dict[str, str | int] = {}
    for key, value in match.groupdict().items():
        fields[key] = value
        if value and value.isdecimal():
            fields |= {f"{key}_before": int(value) - 1, f"{key}_after": int(value) + 1}
    return fields


def shapes_of(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each of a network's variables by its native name."""
    return {"/".join(path[1:]): shape for path, shape in _shapes_of(spec).items()}


def nest(spec: Spec, values: Mapping[str, np.ndarray]) -> dict:
    """Returns the collections `{"params": ..., "batch_stats": ...}` of a network.

    Args:
      spec: The network.
      values: The arrays by their native names.
    """
    return unflatten_dict(
        {path: values["/".join(path[1:])] for path in _shapes_of(spec)}
    )


def _shapes_of(spec: Spec) -> dict[tuple[str, ...], tuple[int, ...]]:
    # Only the head depends on the number of classes, so a network is traced once.
    shapes = dict(_traced_shapes(dataclasses.replace(spec, num_classes=1)))
    for path in [path for path in shapes if path[1] == "head"]:
        shapes[path] = (*shapes[path][:-1], spec.num_classes)
        if not spec.num_classes:
            del shapes[path]
    return shapes


@functools.cache
def _traced_shapes(spec: Spec) -> dict[tuple[str, ...], tuple[int, ...]]:
    # Names do not depend on the image's size, and shapes only do after flattened
    # features. The networks that flatten take 64 pixels or average to a fixed size.
    variables = init_shapes(build(spec), image_size=64)
    return {path: leaf.shape for path, leaf in flatten_dict(variables).items()}


def check_buildable(spec: Spec, tensors: Collection[str], file: os.PathLike) -> None:
    """Checks that the network of a card can be built.

    A card can claim any number of blocks, and a network of a million takes minutes and
    gigabytes to build, even without values.

    Args:
      spec: The spec that the card has.
      tensors: The names of the tensors that the card describes.
      file: The file with the card.

    Raises:
      UserError: The network has many more blocks than there are tensors, or a field of
        the spec has a value that makes it impossible to build.
    """
    blocks = sum(getattr(spec, "stage_sizes", ()))
    if isinstance(spec, ResNetSpec) and spec.spatial == "hierarchical":
        blocks *= spec.scale - 1
    if blocks > max(MANY_BLOCKS, len(tensors)):
        raise UserError(
            f"The card of {file} describes a network of {blocks} blocks, but there are"
            f" only {len(tensors)} tensors. Correct it, or remove it and name the"
            " network."
        )
    try:
        shapes_of(spec)
    # Flax and JAX raise these for numbers that no network can have.
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"The card of {file} describes a network that cannot be built"
            f" ({lines[0].rstrip('.')}). Correct it, or remove it and name the network."
        ) from error


def to_foreign(variables: Mapping, spec: Spec, scheme: Scheme) -> dict[str, np.ndarray]:
    """Returns variables under another framework's names and in its layouts.

    Args:
      variables: The collections `params`, `batch_stats` or both. Trees of the same
        structure, such as gradients, are converted as well.
      spec: The network that they belong to.
      scheme: The naming scheme of the other framework.

    Examples:
      >>> from resnet_jax.models import get_spec
      >>> from resnet_jax.weights import SCHEMES
      >>> variables = {"params": {"head": {"kernel": np.zeros((64, 10))}}}
      >>> spec = get_spec("cifar_resnet20")
      >>> tensors = to_foreign(variables, spec, SCHEMES["timm"])
      >>> {name: value.shape for name, value in tensors.items()}
      {'fc.weight': (10, 64)}
    """
    names = scheme.names(spec)
    tensors = {}
    for path, leaf in flatten_dict(variables).items():
        native, value = "/".join(path[1:]), np.asarray(leaf)
        tensors[names[native]] = scheme.layout(native, value.ndim).to_foreign(value)
    return tensors


def from_foreign(tensors: Tensors, spec: Spec, scheme: Scheme) -> dict:
    """Returns the float32 variables `{"params": ..., "batch_stats": ...}`.

    Args:
      tensors: The arrays under the foreign names and in the foreign layouts.
      spec: The network that they belong to.
      scheme: The naming scheme of the other framework.

    Raises:
      UserError: A tensor is missing, surplus, of the wrong shape or not finite; the
        message names it.
    """
    check_shapes({name: x.shape for name, x in tensors.items()}, spec, scheme)
    names = scheme.names(spec)
    values = {}
    for native, shape in shapes_of(spec).items():
        name = names[native]
        if str(tensors[name].dtype) not in FLOATS:
            raise UserError(
                f"The values of the tensor {name!r} are of the type"
                f" {tensors[name].dtype} and not plain floating-point numbers; save the"
                " weights as float32."
            )
        value = np.asarray(tensors[name], np.float32)
        if not np.isfinite(value).all():
            raise UserError(
                f"The tensor {name!r} has values that are not finite; take an earlier"
                " checkpoint."
            )
        layout = scheme.layout(native, len(shape))
        values[native] = layout.to_native(value.reshape(layout.shape(shape)))
    return nest(spec, values)


def check_shapes(shapes: Shapes, spec: Spec, scheme: Scheme) -> None:
    """Checks that tensors have the names and shapes of a network.

    Axes of length one do not count.

    Args:
      shapes: The shape of each tensor by its foreign name.
      spec: The network.
      scheme: The naming scheme of the names.

    Raises:
      UserError: A tensor is missing, surplus or of the wrong shape; the message names
        it.
    """
    names = scheme.names(spec)
    known = set(names.values())
    candidates = [name for name in shapes if not re.fullmatch(scheme.ignored, name)]
    for name in candidates:
        if name not in known:
            raise UserError(
                f"The network has no place for the tensor {name!r}."
                f"{nearest(name, names.values())}"
            )
    for native, shape in shapes_of(spec).items():
        name = names[native]
        if name not in shapes:
            raise UserError(
                f"The tensor {name!r} is missing.{nearest(name, candidates)}"
            )
        expected = scheme.layout(native, len(shape)).shape(shape)
        if not is_same_shape(shapes[name], expected):
            hint = ""
            if sorted(shapes[name]) == sorted(expected):
                hint = " Its axes are in another order, so transpose it."
            raise UserError(
                f"The tensor {name!r} has the shape {shapes[name]}, but the network"
                f" needs {expected}.{hint}"
            )


def is_same_shape(
    shape: tuple[int, ...] | None, expected: tuple[int, ...] | None
) -> bool:
    """Returns whether shapes are equal but for axes of length one; None equals none."""
    if shape is None or expected is None:
        return False
    return [n for n in shape if n != 1] == [n for n in expected if n != 1]
