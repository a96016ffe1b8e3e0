"""Configs as text and JSON, their comparison, and the keys that a resume may change."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from resnet_jax.config import defaults, old_keys
from resnet_jax.config.durations import UNITS

# Beginnings of the keys that may change when a run resumes, since no parameter depends
# on them, except through the step at which the run ends.
MAY_CHANGE = (
    "checkpoint.",
    "evaluate.",
    "log_every.",
    "sharding.",
    "stop.",
    "data.cache",
    "data.data_dir",
    "data.eval_size",
    "data.eval_split",
    "data.max_pixels",
    "data.num_threads",
    "data.num_workers",
    "data.on_bad_image",
)
# Keys of MAY_CHANGE that may not change if evaluations set the learning rate
# (`optim.schedule=plateau`).
FOR_PLATEAU = ("evaluate.every.", "evaluate.views", "data.eval_size", "data.eval_split")
# Keys that may change if the finished steps keep their learning rates, or if a run is
# extended.
SETS_RATES = ("optim.schedule", "optim.decay_at", "optim.end_learning_rate")
# Keys that name images and weights, which are compared in place of the names.
NAMES = ("data.source", "data.eval_source", "distill.teacher_init", "init_from")


def flatten(config: ConfigDict | Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns {'optim.momentum': 0.9, ...} in alphabetical order of the keys.

    The unit of a duration is part of the key; an empty dictionary is a value.

    Args:
      config: A config or one of its sections.
      prefix: The beginning of all keys, such as `optim.`.
    """
    flat: dict[str, Any] = {}
    for key, value in sorted(config.items()):
        if isinstance(value, ConfigDict | Mapping) and len(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def as_text(config: ConfigDict) -> str:
    """Returns a line for each key, as in the golden texts of `tests/golden/`."""
    return "".join(f"{key} = {value!r}\n" for key, value in flatten(config).items())


def as_json(config: ConfigDict) -> str:
    """Returns the JSON text that is written to `config.json` in the workdir."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_saved(saved: Mapping[str, Any]) -> ConfigDict:
    """Returns the config that a run saved, with the types that overrides need.

    A key that the saved config lacks, because an older version wrote it, gets its
    default.

    Args:
      saved: The sections and keys, as read from JSON.
    """
    config = defaults.get_config()
    with config.ignore_type(), config.unlocked():
        _fill(config, old_keys.update_saved(saved))
    return config


def _fill(config: ConfigDict, saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        default = config.get(key)
        if is_section(default) and isinstance(value, Mapping):
            _fill(default, value)
        else:
            config[key] = _as_tuples(value)


def is_section(default: Any) -> bool:
    """Tells whether a default is a section of keys. Durations are values."""
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
    """Returns the differences of two configs, as 'key: old -> new' for each key.

    A key that the old config lacks, because an older version wrote it, counts with its
    default, since the run behaved as with the default.

    Args:
      old: The saved config, as read from JSON.
      new: The config to compare with it.
      may_differ: Returns true for a key, such as `optim.momentum`, that may differ.
    """

    def values(config: ConfigDict) -> dict[str, Any]:
        # JSON turns the tuples of both into lists.
        flat = flatten(json.loads(as_json(config)))
        return {key: value for key, value in flat.items() if value != {}}

    flat_old, flat_new = values(from_saved(old)), values(new)
    lines = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        before, after = flat_old.get(key, "nothing"), flat_new.get(key, "nothing")
        if before != after and not may_differ(key):
            lines.append(f"{key}: {before!r} -> {after!r}")
    return lines
