"""What a naming scheme is: pairs of names, used in both directions.

Our names are the paths of variables, such as `stage2_block1/shortcut/conv/kernel`
(without the collection). A scheme says what another framework calls a module and its
leaves, and in which order it keeps the axes of an array.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from resnet_jax.errors import UserError, nearest
from resnet_jax.models.cost import init_shapes
from resnet_jax.models.zoo import Spec, build

Rules = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How another framework keeps an array of ours.

    Attributes:
      axes: the order of our axes.
      before, after: number of axes of length one that surround them.
    """

    axes: tuple[int, ...]
    before: int = 0
    after: int = 0

    def theirs(self, value: np.ndarray) -> np.ndarray:
        """Brings an array of ours into their layout."""
        return value.transpose(self.axes).reshape(self.shape(value.shape))

    def ours(self, value: np.ndarray) -> np.ndarray:
        """Brings an array of theirs into our layout."""
        value = value.reshape(value.shape[self.before : value.ndim - self.after])
        return value.transpose(np.argsort(self.axes))

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of theirs, from the shape of ours."""
        turned = tuple(ours[axis] for axis in self.axes)
        return (1,) * self.before + turned + (1,) * self.after


@dataclasses.dataclass(frozen=True)
class Scheme:
    """What one framework calls the variables of our networks.

    Attributes:
      name: of the scheme.
      rules: of a spec, pairs (pattern, template) of module names, of which the first
        whose pattern matches one of our names gives theirs. Templates are formatted
        with the pattern's groups; of a number `i` there are also `i_before` and
        `i_after`.
      leaves: what they call `kernel`, `bias`, ...; or what ends one of our names, such
        as `norm1/bias`, of which the longest counts.
      separator: between their module and leaf.
      layout: of one of our names and its rank, how they keep it.
      ignored: a pattern of names of theirs that carry no weight.
    """

    name: str
    rules: Callable[[Spec], Rules]
    leaves: Mapping[str, str]
    layout: Callable[[str, int], Layout]
    separator: str = "."
    ignored: str = r".*num_batches_tracked"

    def names(self, spec: Spec) -> dict[str, str]:
        """What they call each of our variables: ours -> theirs."""
        rules = self.rules(spec)
        return {path: self.name_of(path, rules) for path in shapes_of(spec)}

    def name_of(self, path: str, rules: Rules) -> str:
        """What they call one of our variables, by the rules of its network."""
        module = path.rpartition("/")[0]
        for pattern, template in rules:
            if match := re.fullmatch(pattern, module):
                theirs = template.format(**_fields(match))
                break
        else:
            raise UserError(f"The naming scheme {self.name} has no name for {path}.")
        return theirs + self.separator + self._leaf(path)

    def _leaf(self, path: str) -> str:
        end = path
        while end not in self.leaves:
            end = end.split("/", 1)[1]
        return self.leaves[end]


def _fields(match: re.Match) -> dict[str, str | int]:
    fields = {}
    for key, value in match.groupdict().items():
        fields[key] = value
        if value and value.isdecimal():
            fields |= {f"{key}_before": int(value) - 1, f"{key}_after": int(value) + 1}
    return fields


def shapes_of(spec: Spec) -> dict[str, tuple[int, ...]]:
    """Our names of a network's variables, with their shapes."""
    return {
        "/".join(path[1:]): leaf.shape
        for path, leaf in flatten_dict(_variables_of(spec)).items()
    }


def nest(spec: Spec, values: Mapping[str, np.ndarray]) -> dict:
    """Returns `{"params": ..., "batch_stats": ...}` of values under our names."""
    return unflatten_dict(
        {path: values["/".join(path[1:])] for path in flatten_dict(_variables_of(spec))}
    )


@functools.cache
def _variables_of(spec: Spec) -> dict:
    # Names and shapes do not depend on the image's size, but for flattened features.
    return init_shapes(build(spec), image_size=64)


def to_theirs(variables: Mapping, spec: Spec, scheme: Scheme) -> dict[str, np.ndarray]:
    """Returns variables under another framework's names and in its layouts.

    Args:
      variables: `params`, `batch_stats` or both; trees of the same structure, such as
        gradients, do as well.
      spec: the network they belong to.
      scheme: of the other framework.
    """
    names = scheme.names(spec)
    tensors = {}
    for path, value in flatten_dict(variables).items():
        ours, value = "/".join(path[1:]), np.asarray(value)
        tensors[names[ours]] = scheme.layout(ours, value.ndim).theirs(value)
    return tensors


def from_theirs(tensors: Mapping[str, np.ndarray], spec: Spec, scheme: Scheme) -> dict:
    """Returns the float32 variables `{"params": ..., "batch_stats": ...}`.

    Args:
      tensors: under their names and in their layouts. A missing, surplus or wrongly
        shaped tensor, or one that is not finite, raises UserError naming it.
      spec: the network they belong to.
      scheme: of the other framework.
    """
    names = scheme.names(spec)
    known = set(names.values())
    given = [name for name in tensors if not re.fullmatch(scheme.ignored, name)]
    for name in given:
        if name not in known:
            raise UserError(
                f"The network has no place for the tensor {name!r}."
                f"{nearest(name, known)}"
            )

    values = {}
    for ours, shape in shapes_of(spec).items():
        name = names[ours]
        if name not in tensors:
            raise UserError(f"The tensor {name!r} is missing.{nearest(name, given)}")
        value = np.asarray(tensors[name], np.float32)
        layout = scheme.layout(ours, len(shape))
        wanted = layout.shape(shape)
        if value.shape != wanted:
            raise UserError(
                f"The tensor {name!r} has the shape {value.shape}, the network needs"
                f" {wanted}."
            )
        if not np.isfinite(value).all():
            raise UserError(f"The tensor {name!r} has values that are not finite.")
        values[ours] = layout.ours(value)
    return nest(spec, values)
