"""Overrides of config keys on the command line, `--config.KEY=VALUE`."""

import ast
import contextlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from ml_collections import ConfigDict

from resnet_jax.config import old_keys, values
from resnet_jax.config.durations import UNITS
from resnet_jax.config.saved import flatten
from resnet_jax.errors import UserError, nearest

PREFIX = "--config."
TRUTHS = {"true": True, "yes": True, "1": True} | {
    "false": False,
    "no": False,
    "0": False,
}
HELP = """\
--config.KEY=VALUE sets a key of the config, such as --config.optim.learning_rate=0.2 or
--config.total.epochs=30 (a duration is in steps, epochs, examples or, but for the
total, percent of the run). All keys are explained by python -m resnet_jax.keys"""


def take_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates the overrides from the other arguments of a command line.

    `--config.KEY VALUE`, `--config.KEY` (true) and `--noconfig.KEY` (false) are
    overrides, too.

    >>> take_overrides(["--config=c.py", "--config.seed", "3", "--noconfig.data.flip"])
    (['--config=c.py'], ['--config.seed=3', '--config.data.flip=false'])

    Args:
      arguments: A command line.

    Returns:
      The other arguments, and the overrides in the form `--config.KEY=VALUE`, or
      `--config.KEY` for one without a value.
    """
    other_arguments: list[str] = []
    overrides: list[str] = []
    unread = list(arguments)
    while unread:
        argument = unread.pop(0)
        if argument == "--":
            return [*other_arguments, argument, *unread], overrides
        # absl's flags may begin with a single dash.
        name, equals, value = re.sub("^-(?=[^-])", "--", argument).partition("=")
        negated = name.startswith("--noconfig.") and not equals
        if negated:
            name, value = name.replace("--no", "--", 1), "false"
        elif not name.startswith(PREFIX):
            other_arguments.append(argument)
            continue
        elif not equals:
            if not unread or re.match("-+[a-zA-Z]", unread[0]):
                overrides.append(name)
                continue
            value = unread.pop(0)
        overrides.append(f"{name}={value}")
    return other_arguments, overrides


def override(config: ConfigDict, arguments: Sequence[str]) -> None:
    """Applies overrides to a config, of which the last one for a key counts.

    Args:
      config: The config, which is changed in place.
      arguments: Overrides, `--config.KEY=VALUE`, `--config.KEY VALUE`, `--config.KEY`
        (true) or `--noconfig.KEY` (false). A value has the type of the key's present
        value, but a duration may have another unit.

    Raises:
      UserError: An argument is not an override, the config does not have the key, or
        the value has another type or is out of the key's range.

    Examples:
      >>> from resnet_jax.config import defaults
      >>> config = defaults.get_config()
      >>> override(config, ["--config.total.steps=5", "--config.data.flip=false"])
      >>> config.total.steps, config.data.flip
      (5, False)
    """
    other_arguments, overrides = take_overrides(arguments)
    if other_arguments:
        raise UserError(
            f"Unexpected argument {other_arguments[0]!r}. Overrides are written"
            " --config.KEY=VALUE."
        )
    for argument in overrides:
        key, equals, text = argument.removeprefix(PREFIX).partition("=")
        if key in old_keys.REMOVED:
            old_keys.check_removed(key, _number(argument, text))
            continue
        key = old_keys.present_name(key)
        value: Any
        *path, last = key.split(".")
        node = _node(config, path, key, text)
        if last in UNITS and set(node) <= set(UNITS):
            value = {last: _number(argument, text)}
            *path, last = path
            node = _node(config, path, key, text)
        elif last not in node:
            _refuse_key(config, key, node, text)
        elif equals:
            value = _read(argument, text, node, last, ".".join((*path, last)))
        elif node.get_type(last) is bool:
            value = True
        else:
            raise UserError(f"{argument} needs a value: {argument}=VALUE.")
        values.check_value(".".join((*path, last)), value)
        # The whole dictionary is replaced, not only the entries that are given.
        value = ConfigDict(value) if isinstance(value, dict) else value
        try:
            node[last] = value
        except TypeError as error:
            raise UserError(f"{argument}: {error}.") from None


def _node(config: ConfigDict, path: list[str], key: str, text: str) -> ConfigDict:
    """Returns the section that holds a key."""
    node = config
    for part in path:
        if part not in node or not isinstance(node[part], ConfigDict):
            _refuse_key(config, key, node, text)
        node = node[part]
    return node


def _refuse_key(config: ConfigDict, key: str, node: ConfigDict, text: str) -> NoReturn:
    """Raises UserError for a key that the config does not have."""
    section, _, field = key.rpartition(".")
    if section.endswith((".overrides", ".target")):
        value = _literal(text)
        raise UserError(
            f"The config's {section} does not set {field} yet; set all of its fields"
            f' together: --config.{section}="{node.to_dict() | {field: value}}"'
        )
    raise UserError(f"The config has no key {key!r}.{nearest(key, flatten(config))}")


def _read(argument: str, text: str, node: ConfigDict, last: str, key: str) -> Any:
    """Returns the value of an override, with the type of the key's present value."""
    kind, present = node.get_type(last), node[last]
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in TRUTHS:
            raise UserError(f"{argument} is neither true nor false.")
        return TRUTHS[text.lower()]
    if kind in (int, float):
        number = _number(argument, text)
        if kind is int and number != int(number):
            raise UserError(f"{argument} is not a whole number.")
        return kind(number)
    is_truth = text.lower() in ("true", "false")
    value = _literal(text.capitalize() if is_truth else text)
    if issubclass(kind, tuple | list):
        if not isinstance(value, tuple | list):
            example = present or values.default_values().get(key) or ("a", "b")
            raise UserError(f'{argument} is not a tuple, such as "{tuple(example)}".')
        return kind(value)
    if issubclass(kind, ConfigDict):
        if any(name.startswith(f"{key}.") for name in values.default_values()):
            raise UserError(f"{argument}: {key} is a section; set its keys one by one.")
        if not isinstance(value, dict):
            if key in values.DURATIONS or (present and set(present) <= set(UNITS)):
                raise UserError(
                    f"{argument} has no unit. Write {PREFIX}{key}.epochs=NUMBER, or"
                    " .steps or .examples."
                )
            usual = {"top1": 0.95} if key == "stop.target" else {"epochs": 1}
            example = json.dumps(present.to_dict() or usual).replace('"', "'")
            raise UserError(f'{argument} is not a dictionary, such as "{example}".')
    return value


def _literal(text: str) -> Any:
    """Returns the Python value that a text is, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _number(argument: str, text: str) -> int | float:
    """Returns a finite number, as an integer if it is written as one."""
    number = _literal(text)
    # An integer may be too large for a float.
    with contextlib.suppress(OverflowError):
        if type(number) in (int, float) and math.isfinite(number):
            return number
    raise UserError(f"{argument} is not a number.")
