"""The Python files that describe configs, and the functions that they call."""

import inspect
import os
import pathlib
import re
import runpy
import traceback
from collections.abc import Collection

import ml_collections
from ml_collections import ConfigDict

from resnet_jax.config import defaults, values
from resnet_jax.config.saved import flatten
from resnet_jax.errors import UserError, nearest

PACKAGE = pathlib.Path(__file__).parents[1]
# The folder of the recipes that ship with resnet_jax, which is inside the installed
# package, and beside the package in a checkout.
RECIPES = next(
    folder
    for folder in (PACKAGE / "configs", PACKAGE.parent / "configs")
    if (folder / "r50.py").is_file()
)


def find(path: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a config's file.

    A file that exists is preferred. Otherwise `configs/NAME.py` is the recipe of that
    name that ships with resnet_jax, whatever the current directory is.

    Args:
      path: `FILE.py` or `FILE.py:VARIANT`.

    Raises:
      UserError: There is no such file, or it is not a Python file.
    """
    file = pathlib.Path(os.fspath(path).partition(":")[0])
    if file.is_file():
        if file.suffix != ".py":
            raise UserError(
                f"{file} is not a config; a config is a Python file, NAME.py."
            )
        return file
    shipped = RECIPES / file.name
    if file.parent == pathlib.Path("configs") and shipped.is_file():
        return shipped
    neighbours = [str(path) for path in sorted(file.parent.glob("*.py"))]
    recipes = [f"configs/{path.name}" for path in sorted(RECIPES.glob("*.py"))]
    known = dict.fromkeys(neighbours + recipes)
    raise UserError(f"There is no config {file}.{nearest(str(file), known)}")


def load(path: str | os.PathLike) -> ConfigDict:
    """Returns the config that the function `get_config` of a file returns.

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
            f"{file} is not valid Python: line {error.lineno}: {error.msg}."
        ) from None
    except ImportError as error:
        # The configs of versions before 0.2 imported the defaults from the checkout.
        if (error.name or "").partition(".")[0] != "configs":
            raise UserError(f"{file} cannot be imported: {error}.") from None
        raise UserError(
            f"{file}: {error}. Import the defaults as resnet_jax.config.defaults, and"
            ' load a recipe with resnet_jax.config.load(RECIPES / "r50.py").'
        ) from None
    if get_config is None:
        raise UserError(f"{file} is not a config; it has no function get_config.")
    arguments = [variant] if variant else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if variant:
            raise UserError(f"{file} has no variants; leave :{variant} out.") from None
        raise UserError(f"{file} needs a variant; write {file}:VARIANT.") from None
    try:
        config = get_config(*arguments)
    except (AttributeError, KeyError, TypeError) as error:
        if problem := _key_problem(error, file):
            raise UserError(problem) from None
        raise
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"{file} is not a config; get_config returned {type(config).__name__}, not"
            " ConfigDict."
        )
    try:
        values.check(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return config


def _key_problem(error: Exception, file: pathlib.Path) -> str:
    """Returns a sentence about the line of a file that failed to set a key.

    It is '' if the error has another cause.
    """
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
    """Returns the index of a recipe's variant among its variants.

    >>> choose("a2", ["a1", "a2", "a3"])
    1

    Args:
      variant: The variant, as the user wrote it after the file's name and a colon.
      known: All variants of the recipe.

    Raises:
      UserError: The recipe has no such variant; the message lists all of them.
    """
    if variant not in known:
        raise UserError(
            f"The recipe has no variant {variant!r}.{nearest(variant, known)} Write one"
            f" of {', '.join(known)} after the file's name and a colon."
        )
    return list(known).index(variant)


def rescaled_ema_decay(
    decay: float, *, batch_size: int, every: int, epochs: float | int
) -> float:
    """Returns an EMA's decay rate, adapted to the batch size and the length of a run.

    It is 1 - min(1, (1 - decay) * batch_size * every / epochs), as torchvision's
    references adapt `--model-ema-decay`.

    >>> round(rescaled_ema_decay(0.99998, batch_size=1024, every=32, epochs=600), 6)
    0.998908

    Args:
      decay: The decay rate that torchvision's command line takes.
      batch_size: Images per step, over all devices.
      every: The number of steps between two updates of the EMA.
      epochs: The length of the run in epochs.
    """
    return 1 - min(1.0, (1 - decay) * batch_size * every / epochs)
