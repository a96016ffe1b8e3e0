"""Config keys of the previous version, which are accepted for one more version.

A removed key may be set to the value that is now fixed, and a renamed key to any value;
a warning says what to write instead.
"""

import logging
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from resnet_jax.errors import UserError

log = logging.getLogger(__name__)

# The fixed value of each removed key.
REMOVED: dict[str, Any] = {"optim.rms_decay": 0.9, "optim.trust_coefficient": 0.001}
# The present name of each renamed key; it stays in its section.
RENAMED: dict[str, str] = {
    "bn_recompute": "precise_bn",
    "model.unwritten": "model.fused_norm",
}


def present_name(key: str) -> str:
    """Returns the present name of a key, and warns if it has changed."""
    if key in RENAMED:
        log.warning("The key %s is now called %s.", key, RENAMED[key])
    return RENAMED.get(key, key)


def check_removed(key: str, value: Any) -> None:
    """Warns that a removed key has no effect.

    Args:
      key: A key of `REMOVED`.
      value: The value that it is given.

    Raises:
      UserError: The value is not the one that is now fixed.
    """
    if value != REMOVED[key]:
        raise UserError(
            f"The key {key} was removed, and its value is always {REMOVED[key]!r}, not"
            f" {value!r}; leave it out."
        )
    log.warning("The key %s was removed and has no effect; leave it out.", key)


def update_saved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved config of an older version with the keys of this version.

    It does not warn, since older versions saved every key. Removed keys are left out
    whatever their value is, since no network depends on them; see `changed_removed`.

    Args:
      saved: The sections and keys, as read from JSON; they are not changed.
    """
    updated = {k: dict(v) if isinstance(v, Mapping) else v for k, v in saved.items()}
    for key in (*REMOVED, *RENAMED):
        path, _, name = key.rpartition(".")
        section = updated.get(path, {}) if path else updated
        if name not in section:
            continue
        value = section.pop(name)
        if key in RENAMED:
            section[RENAMED[key].rpartition(".")[2]] = value
    return updated


def changed_removed(saved: Mapping[str, Any]) -> list[str]:
    """Returns the removed keys of a saved config whose values are no longer possible.

    Each is given as 'key: old -> new'. Training cannot go on with them as before.

    Args:
      saved: The sections and keys, as read from JSON.
    """
    lines = []
    for key, fixed in REMOVED.items():
        section, _, name = key.rpartition(".")
        value = saved.get(section, {}).get(name, fixed)
        if value != fixed:
            lines.append(f"{key}: {value!r} -> {fixed!r}, now its only value")
    return lines


class Config(ConfigDict):
    """A config that reads and writes the present key where it is asked for an old one.

    It equals a ConfigDict with the same keys.
    """

    _section = ""

    def __setitem__(self, key: str, value: Any) -> None:
        path = f"{self._section}{key}"
        if path in REMOVED:
            check_removed(path, value)
        elif path in RENAMED:
            super().__setitem__(present_name(path).rpartition(".")[2], value)
        elif isinstance(value, dict | ConfigDict) and isinstance(self.get(key), Config):
            # A whole section may be replaced, although its class is another one.
            self._fields[key] = ConfigDict(value) if isinstance(value, dict) else value
        else:
            super().__setitem__(key, value)

    def __getitem__(self, key: str) -> Any:
        path = f"{self._section}{key}"
        if path in REMOVED:
            return REMOVED[path]
        if path in RENAMED:
            return super().__getitem__(RENAMED[path].rpartition(".")[2])
        return super().__getitem__(key)

    def __eq__(self, value: object) -> bool:
        # The method of ConfigDict is false if only `self` is of a subclass.
        if type(value) is ConfigDict:
            return value.__eq__(self)
        return super().__eq__(value)


class Model(Config):
    """The section `model`."""

    _section = "model."


class Optim(Config):
    """The section `optim`."""

    _section = "optim."
