"""The parser of command lines, and the types of arguments that commands share."""

import argparse
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NoReturn

from resnet_jax.console import output
from resnet_jax.errors import UserError, nearest

# Benchmarks also run where ml_collections is not installed, so `resnet_jax.config` is
# imported only for commands that take a config.
if TYPE_CHECKING:
    from ml_collections import ConfigDict

CONFIG = (
    "The config: a file of your own, or configs/NAME.py, a recipe that ships with"
    " resnet_jax (python -m resnet_jax.recipes lists them). FILE.py:VARIANT names a"
    " variant. The file runs as Python, so read a stranger's file first."
)


class Parser(argparse.ArgumentParser):
    """The parser of a command, whose mistakes are a UserError.

    Args:
      command: The command's name after `python -m resnet_jax.`, such as `plan`.
      description: The text above the flags in `--help`; usually the docstring of the
        command's module.
    """

    def __init__(self, command: str, description: str | None):
        super().__init__(
            prog=f"python -m resnet_jax.{command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            # An abbreviation would change its meaning when a flag is added.
            allow_abbrev=False,
            add_help=False,
        )
        self.add_argument(
            "-h", "--help", action="help", help="Prints this text and exits."
        )

    def add_config(self, note: str = "", **options) -> None:
        """Adds `--config`, and with it `--config.KEY=VALUE`.

        Args:
          note: A sentence that follows the flag's help, for example on its default.
          **options: Other arguments of `add_argument`.
        """
        from resnet_jax.config.overrides import HELP

        self.add_argument("--config", help=f"{CONFIG} {note}".rstrip(), **options)
        self.set_defaults(overrides=[])
        self.epilog = HELP

    def add_weights(self, name: str = "weights", **options) -> None:
        """Adds the argument of weights, and the flag `--model`.

        Args:
          name: The name of the argument.
          **options: Other arguments of `add_argument`.
        """
        self.add_argument(
            name,
            **{"metavar": "WEIGHTS", **options},
            help="The weights: a file of torchvision, timm, Keras or BiT, a workdir of"
            " a run, a weights directory, or timm:NAME.TAG on the Hugging Face hub.",
        )
        self.add_argument(
            "--model",
            metavar="NAME",
            help="The network's name. It is needed only if neither the weights nor a"
            " card beside them name the network. The default is then the first network"
            " that the weights fit.",
        )

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses a command line.

        Args:
          arguments: The command line, without the name of the program.

        Returns:
          The values of the flags. Commands that take `--config` also find `overrides`
          there, see `load_config`.

        Raises:
          UserError: A flag is unknown or missing, or its value is not allowed.
        """
        remaining = list(arguments)
        overrides: list[str] = []
        if self.get_default("overrides") is not None:
            from resnet_jax.config.overrides import take_overrides

            remaining, overrides = take_overrides(remaining)
        check_values(
            remaining,
            [x for x, flag in self._option_string_actions.items() if flag.nargs != 0],
        )
        args, unknown = self.parse_known_args(remaining)
        for argument in unknown:
            flag = argument.partition("=")[0]
            if flag.startswith("-"):
                known = [x for x in self._option_string_actions if x != "-h"]
                raise UserError(f"There is no flag {flag}.{nearest(flag, known)}")
            raise UserError(
                f"Unexpected argument {argument!r}. Flags are written --name=value."
            )
        if overrides:
            args.overrides = overrides
        return args

    def warn_of_unused(
        self, args: argparse.Namespace, flags: Sequence[str], cause: str
    ) -> None:
        """Warns of flags that were given although they have no effect.

        Args:
          args: The result of `parse`.
          flags: The names of the flags, without dashes.
          cause: The flag or argument that makes them useless, such as `--sweep`.
        """
        for flag in flags:
            if getattr(args, flag) != self.get_default(flag):
                output.warn(f"--{flag} has no effect with {cause}.")

    def error(self, message: str) -> NoReturn:
        """Raises UserError with argparse's message as a sentence."""
        message = message[:1].upper() + message[1:]
        raise UserError(f"{message} ({self.prog} --help lists the flags).")


def load_config(args: argparse.Namespace) -> "ConfigDict":
    """Loads the config that a command line names, and applies its overrides.

    Args:
      args: The result of `Parser.parse` for a command that takes `--config`.

    Returns:
      The config, which is not yet checked for contradictions.

    Raises:
      UserError: There is no such file, or a key or a value is not allowed.
    """
    from resnet_jax.config import load, override

    config = load(args.config)
    override(config, args.overrides)
    return config


def check_values(arguments: Sequence[str], flags: Collection[str]) -> None:
    """Checks that values are not empty, and warns of flags that are given twice.

    Args:
      arguments: A command line without overrides and the name of the program.
      flags: The names of the flags that take a value, such as `--workdir`.

    Raises:
      UserError: A value is empty, which an unset variable of the shell is.
    """
    values: dict[str, str] = {}
    unread = list(arguments)
    while unread and unread[0] != "--":
        # absl's flags may begin with a single dash.
        name, equals, value = re.sub("^-(?=[^-])", "--", unread[0]).partition("=")
        unread.pop(0)
        if name in flags and not equals and unread:
            value = unread.pop(0)
        elif name and not equals:
            continue
        if not value.strip():
            subject = f"{name} is" if name else "An argument is"
            raise UserError(
                f"{subject} empty; is a variable unset? Give a value, or leave it out."
            )
        if name in flags and values.setdefault(name, value) != value:
            output.warn(f"{name} is given more than once; the last one counts: {value}")
            values[name] = value


# The largest whole number that a flag may have: more are mistakes, and too many for
# 32-bit integers.
_LARGEST = 2**31 - 1


def whole_number(smallest: int, largest: int = _LARGEST) -> Callable[[str], int]:
    """Returns a parser of whole numbers, which may be written as 1000, 1_000 or 1e3.

    >>> whole_number(1, 100)("1e2")
    100

    Args:
      smallest: The smallest number that is allowed.
      largest: The largest one.
    """

    def parse(text: str) -> int:
        number = _number(text)
        if number.is_integer() and smallest <= number <= largest:
            return int(number)
        kind = f"from {smallest} to {largest}"
        if largest == _LARGEST and not number > largest:
            kind = f"above {smallest - 1}" if smallest else "of at least 0"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {kind}")

    return parse


count = whole_number(1)


def positive_number(text: str) -> float:
    """Parses a number above 0, such as `1.2`."""
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def _number(text: str) -> float:
    """Returns a number, or NaN if the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def seconds(text: str) -> float:
    """Parses a time such as 25, 25s, 0.5m or 1h into seconds.

    >>> seconds("1.5m")
    90.0
    """
    scale = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    number = scale * _number(text[:-1]) if scale else _number(text)
    if not 0 <= number <= _LARGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time, such as 25s or 30m")
    return number


def counts(text: str) -> list[int]:
    """Parses a list of whole numbers of at least 1, such as `128,256`."""
    return [count(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """Parses a list of words, such as `float32,bfloat16`."""
    parts = text.split(",")
    if not all(parts):
        message = f"{text!r} has an empty part; give words with single commas between"
        raise argparse.ArgumentTypeError(message)
    return parts
