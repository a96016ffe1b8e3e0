"""The parser of command lines, and the types of arguments that commands share."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from resnet_jax.errors import UserError, nearest

# Benchmarks also run where ml_collections is not installed, so `resnet_jax.config` is
# imported only for commands that take a config.
if TYPE_CHECKING:
    from ml_collections import ConfigDict

CONFIG = (
    "The config: a file of your own, or configs/NAME.py, a recipe that ships with"
    " resnet_jax (python -m resnet_jax.recipes lists them). FILE.py:VARIANT names a"
    " variant."
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


def count(text: str) -> int:
    """Parses a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return number


def counts(text: str) -> list[int]:
    """Parses a list of whole numbers of at least 1, such as `128,256`."""
    return [count(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    """Parses a list of words, such as `float32,bfloat16`."""
    return text.split(",")
