"""Configs as text and JSON, their comparison, and what may change on a resume."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from resnet_jax.config import defaults
from resnet_jax.config.durations import UNITS

# These may differ when a run resumes, since they change no parameter.
MAY_CHANGE = (
    "checkpoint.",
    "evaluate.",
    "log_every.",
    "sharding.",
    "data.cache",
    "data.data_dir",
    "data.eval_size",
    "data.eval_split",
    "data.num_threads",
    "data.num_workers",
    "data.on_bad_image",
)
# These may not where evaluations set the learning rate (`optim.schedule=plateau`).
FOR_PLATEAU = ("evaluate.every.", "evaluate.views", "data.eval_size", "data.eval_split")
# These may where all steps keep their learning rates, or a run is extended.
SETS_RATES = ("optim.schedule", "optim.decay_at", "optim.end_learning_rate")
# `training/resume.py` compares the images and weights that these name.
NAMES = ("data.source", "data.eval_source", "distill.teacher_init", "init_from")


def flatten(config: ConfigDict | Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns {'optim.momentum': 0.9, ...} in alphabetical order.

    A duration keeps its unit in the name; an empty dictionary is a value.
    """
    flat = {}
    for key, value in sorted(config.items()):
        if isinstance(value, ConfigDict | Mapping) and len(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def as_text(config: ConfigDict) -> str:
    """Returns one line a key, as kept under `tests/golden/configs/`."""
    return "".join(f"{key} = {value!r}\n" for key, value in flatten(config).items())


def as_json(config: ConfigDict) -> str:
    """Returns the config as it is kept in the workdir."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_saved(saved: Mapping[str, Any]) -> ConfigDict:
    """Returns the config that was saved as JSON, with the types that overrides need.

    A key that the saved config lacks, as it was written by an older version, gets its
    default.
    """
    config = defaults.get_config()
    with config.ignore_type(), config.unlocked():
        _fill(config, saved)
    return config


def _fill(config: ConfigDict, saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        default = config.get(key)
        if is_section(default) and isinstance(value, Mapping):
            _fill(default, value)
        else:
            config[key] = _as_tuples(value)


def is_section(default: Any) -> bool:
    """Tells whether a default is a section of keys; a duration, say, is a value."""
    return isinstance(default, ConfigDict) and bool(set(default) - set(UNITS))


def _as_tuples(value: Any) -> Any:
    """Turns the lists of JSON, at any depth, into tuples."""
    if isinstance(value, list):
        return tuple(map(_as_tuples, value))
    if isinstance(value, Mapping):
        return {key: _as_tuples(part) for key, part in value.items()}
    return value


def differences(
    old: Mapping, new: ConfigDict, may_differ: Callable[[str], bool] = lambda key: False
) -> list[str]:
    """Returns how two configs differ, as 'key: old -> new' for each key.

    A key that the old one lacks, as it was written by an older version, has the default
    value, which is what the run did.

    Args:
      old: The saved config.
      new: The config to compare with it.
      may_differ: Tells of a key, such as `optim.momentum`, that it is not compared.
    """

    def values(config: ConfigDict) -> dict[str, Any]:
        # Through JSON, where tuples are lists.
        flat = flatten(json.loads(as_json(config)))
        return {key: value for key, value in flat.items() if value != {}}

    flat_old, flat_new = values(from_saved(old)), values(new)
    found = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        before, after = flat_old.get(key, "nothing"), flat_new.get(key, "nothing")
        if before != after and not may_differ(key):
            found.append(f"{key}: {before!r} -> {after!r}")
    return found
