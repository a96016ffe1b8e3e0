"""Config keys of the previous version, which are accepted for one more version.

A removed key may be set to the value that is now fixed, and a renamed key to any value;
a warning says what to write instead.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from ml_collections import ConfigDict, FieldReference

from resnet_jax.errors import UserError

log = logging.getLogger(__name__)

# The fixed value of each removed key.
REMOVED: dict[str, Any] = {"optim.rms_decay": 0.9, "optim.trust_coefficient": 0.001}
# The present name of each renamed key; it stays in its section.
RENAMED: dict[str, str] = {
    "bn_recompute": "precise_bn",
    "model.unwritten": "model.fused_norm",
}

_accepted = ContextVar("_accepted", default=False)


def present_name(key: str) -> str:
    """Returns the present name of a key, and warns if it has changed."""
    if key in RENAMED:
        log.warning("The key %s is now called %s.", key, RENAMED[key])
    return RENAMED.get(key, key)


def check_removed(key: str, value: Any, warn: bool = True) -> None:
    """Checks the value that is given to a removed key.

    Args:
      key: A key of `REMOVED`.
      value: The value that it is given.
      warn: True to warn that the key has no effect.

    Raises:
      UserError: The value is not the one that is now fixed.
    """
    if value != REMOVED[key]:
        raise UserError(
            f"The key {key} was removed, and its value is always {REMOVED[key]!r}, not"
            f" {value!r}; leave it out."
        )
    if warn:
        log.warning("The key %s was removed and has no effect; leave it out.", key)


def update_saved(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a saved config of an older version with the keys of this version.

    It does not warn, since older versions saved every key.

    Args:
      saved: The sections and keys, as read from JSON; they are not changed.

    Raises:
      UserError: A removed key has another value than the one that is now fixed.
    """
    updated = {k: dict(v) if isinstance(v, Mapping) else v for k, v in saved.items()}
    for key in (*REMOVED, *RENAMED):
        path, _, name = key.rpartition(".")
        section = updated.get(path, {}) if path else updated
        if name not in section:
            continue
        value = section.pop(name)
        if key in REMOVED:
            check_removed(key, value, warn=False)
        else:
            section[RENAMED[key].rpartition(".")[2]] = value
    return updated


@contextlib.contextmanager
def accepted() -> Iterator[None]:
    """Lets the defaults accept old keys while a config file runs."""
    token = _accepted.set(True)
    try:
        yield
    finally:
        _accepted.reset(token)


def add_to(config: ConfigDict) -> None:
    """Adds the old keys to an unlocked config, inside `accepted` only."""
    if _accepted.get():
        for key in (*REMOVED, *RENAMED):
            path, _, name = key.rpartition(".")
            (config[path] if path else config)[name] = _OldKey(config, key)


def remove_from(config: ConfigDict) -> None:
    """Removes the old keys from a config, outside of `accepted` only."""
    if not _accepted.get():
        for key in (*REMOVED, *RENAMED):
            path, _, name = key.rpartition(".")
            section = config.get(path, ConfigDict()) if path else config
            # Deleting a key needs an unlocked config, and locking it again would lock
            # the sections whose keys are free.
            section._fields.pop(name, None)


class _OldKey(FieldReference):
    """A field of a config that stands for an old key.

    It reads and writes the present key.
    """

    def __init__(self, config: ConfigDict, key: str):
        self._config, self._key = config, key
        super().__init__(None, field_type=object)

    def set(self, value: Any, type_safe: bool = True) -> None:
        super().set(None)
        if value is None:
            return
        if self._key in REMOVED:
            check_removed(self._key, value)
        else:
            path, _, name = present_name(self._key).rpartition(".")
            (self._config[path] if path else self._config)[name] = value

    def get(self) -> Any:
        if self._key in REMOVED:
            return REMOVED[self._key]
        return self._config[RENAMED[self._key]]
