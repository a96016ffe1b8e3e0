"""The files that describe configs, and what they call."""

import inspect
import os
import pathlib
import re
import runpy
import traceback
from collections.abc import Collection

import ml_collections
from ml_collections import ConfigDict

from resnet_jax.config import defaults
from resnet_jax.config.saved import flatten
from resnet_jax.errors import UserError, nearest

PACKAGE = pathlib.Path(__file__).parents[1]
# The recipes that ship with resnet_jax: inside the package once it is installed, beside
# it in a checkout.
RECIPES = next(
    folder
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs")
    if (folder / "r50.py").is_file()
)


def find(path: str | os.PathLike) -> pathlib.Path:
    """Returns the file of a config.

    A file that exists wins; otherwise `configs/NAME.py` is the recipe of that name that
    ships with resnet_jax, whatever the current directory is.

    Args:
      path: `FILE.py` or `FILE.py:VARIANT`.

    Raises:
      UserError: There is no such file.
    """
    file = pathlib.Path(os.fspath(path).partition(":")[0])
    if file.is_file():
        if file.suffix != ".py":
            raise UserError(f"{file} is not a config: that is a file in Python, .py.")
        return file
    shipped = RECIPES / file.name
    if file.parent == pathlib.Path("configs") and shipped.is_file():
        return shipped
    own = [str(found) for found in sorted(file.parent.glob("*.py"))]
    recipes = [f"configs/{found.name}" for found in sorted(RECIPES.glob("*.py"))]
    raise UserError(
        f"There is no config {file}.{nearest(str(file), dict.fromkeys(own + recipes))}"
    )


def load(path: str | os.PathLike) -> ConfigDict:
    """Returns the config that a file describes.

    >>> load("configs/r50.py").model.name
    'resnet50'

    Args:
      path: `FILE.py` or `FILE.py:VARIANT`; see `find`.

    Raises:
      UserError: There is no such file or variant, or the file does not describe a
        config.
    """
    file, variant = find(path), os.fspath(path).partition(":")[2]
    try:
        get_config = runpy.run_path(str(file)).get("get_config")
    except SyntaxError as error:
        raise UserError(
            f"{file} is not a config in Python: line {error.lineno}: {error.msg}."
        ) from None
    except ImportError as error:
        # Configs of versions before 0.2 imported the defaults from the checkout.
        if (error.name or "").partition(".")[0] != "configs":
            raise UserError(f"{file} cannot be imported: {error}.") from None
        raise UserError(
            f"{file}: {error}. The defaults are resnet_jax.config.defaults, and"
            ' load(RECIPES / "r50.py") of resnet_jax.config returns a recipe.'
        ) from None
    if get_config is None:
        raise UserError(f"{file} is not a config: it has no function get_config.")
    arguments = [variant] if variant else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if variant:
            raise UserError(f"{file} has no variants: leave :{variant} out.") from None
        raise UserError(f"{file} needs a variant: {file}:VARIANT.") from None
    try:
        config = get_config(*arguments)
    except (AttributeError, KeyError, TypeError) as error:
        if said := _refused_key(error, file):
            raise UserError(said) from None
        raise
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{file} is not a config: get_config returned {type(config).__name__}, not"
            " ConfigDict."
        )
    return config


def _refused_key(error: Exception, file: pathlib.Path) -> str:
    """Returns what a config's own line set that no config has; '' for other errors."""
    frames = traceback.extract_tb(error.__traceback__)
    library = str(pathlib.Path(ml_collections.__file__).parent)
    if not frames[-1].filename.startswith(library):
        return ""
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    if not lines:
        return ""
    reason = " ".join(str(error.args[0]).split()) if error.args else repr(error)
    if missing := re.search('Key "(.*?)" does not exist', reason):
        keys = {
            part for key in flatten(defaults.get_config()) for part in key.split(".")
        }
        reason = f"There is no key {missing[1]!r}.{nearest(missing[1], sorted(keys))}"
    return f"{file}, line {lines[-1]}: {reason[:300]}"


def choose(variant: str, known: Collection[str]) -> int:
    """Returns the index of a recipe's variant among those that it has.

    Raises UserError, with the nearest ones, if it has no such variant.
    """
    if variant not in known:
        raise UserError(
            f"The recipe has no variant {variant!r}.{nearest(variant, known)} It is"
            f" one of {', '.join(known)}, after the file and a colon."
        )
    return list(known).index(variant)


def rescaled_ema_decay(
    decay: float, *, batch_size: int, every: int, epochs: float | int
) -> float:
    """Returns the decay of an EMA that does not depend on batch size and epochs.

    1 - min(1, (1 - decay) * batch_size * every / epochs), which is what torchvision's
    recipes make of `--model-ema-decay`; `batch_size` is over all devices.
    """
    return 1 - min(1.0, (1 - decay) * batch_size * every / epochs)
