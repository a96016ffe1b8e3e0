"""The Python files that describe configs, and the functions that they call."""

import contextlib
import inspect
import os
import pathlib
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence

import ml_collections
from ml_collections import ConfigDict

from resnet_jax import paths
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


def _file_and_variant(path: str | os.PathLike) -> tuple[str, str]:
    """Splits FILE.py:VARIANT; a directory's name may have a colon as well."""
    text = os.fspath(path)
    if match := re.fullmatch(r"(.*?\.py):(.*)", text, re.DOTALL):
        return match[1], match[2]
    return text, ""


def find(path: str | os.PathLike) -> pathlib.Path:
    """Returns the path of a config's file.

    A file that exists is preferred. Otherwise `configs/NAME.py` is the recipe of that
    name that ships with resnet_jax, whatever the current directory is.

    Args:
      path: `FILE.py` or `FILE.py:VARIANT`.

    Raises:
      UserError: There is no such file, or it is not a Python file.
    """
    file = paths.local(_file_and_variant(path)[0])
    if file.is_file() and file.suffix == ".py":
        return file
    shipped = RECIPES / file.name
    if file.parent == pathlib.Path("configs") and shipped.is_file():
        return shipped
    if file.exists():
        kind = "is a directory" if file.is_dir() else "is not a config"
        raise UserError(f"{file} {kind}; a config is a Python file, NAME.py.")
    neighbours = [str(path) for path in sorted(file.parent.glob("*.py"))]
    recipes = [f"configs/{path.name}" for path in sorted(RECIPES.glob("*.py"))]
    known = dict.fromkeys(neighbours + recipes)
    raise UserError(f"There is no config {file}.{nearest(str(file), known)}")


def load(path: str | os.PathLike) -> ConfigDict:
    """Returns the config that the function `get_config` of a file returns.

    The file runs as Python with all your rights, so read a stranger's file first. A
    file that exists is preferred; otherwise `configs/NAME.py` is the recipe of that
    name that ships with resnet_jax.

    Args:
      path: `FILE.py` or `FILE.py:VARIANT`.

    Raises:
      UserError: There is no such file or variant, the file does not describe a config,
        or its code fails. Exceptions of this package and of the recipes that ship with
        it are raised as they are.

    Examples:
      >>> load("configs/r50.py").model.name
      'resnet50'
    """
    file, variant = find(path), _file_and_variant(path)[1]
    _check_syntax(file)
    with _explaining_failures(file):
        get_config = runpy.run_path(str(file)).get("get_config")
    if not callable(get_config):
        raise UserError(f"{file} is not a config; it has no function get_config.")
    arguments = [variant] if variant else []
    if not _takes(get_config, arguments):
        if variant and _takes(get_config, []):
            raise UserError(f"{file} has no variants; leave :{variant} out.")
        if _takes(get_config, [""]):
            raise UserError(f"{file} needs a variant; write {file}:VARIANT.")
        raise UserError(
            f"{file} is not a config; its get_config may have one argument, the"
            " variant, and no other without a default."
        )
    with _explaining_failures(file):
        config = get_config(*arguments)
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


def _check_syntax(file: pathlib.Path) -> None:
    """Raises UserError if a file cannot be read or is not Python."""
    try:
        source = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    try:
        # The file is compiled again when it runs, with its warnings.
        with warnings.catch_warnings(action="ignore"):
            compile(source, file, "exec")
    except SyntaxError as error:
        place = f"line {error.lineno}: " if error.lineno else ""
        raise UserError(f"{file} is not valid Python: {place}{error.msg}.") from None
    # Python 3.11 raises ValueError for a null byte.
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or "it is nested too deeply"
        raise UserError(f"{file} is not valid Python: {reason}.") from None


def _takes(function: Callable, arguments: Sequence[str]) -> bool:
    """Returns whether a function can be called with the arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    # Some functions that are written in C do not tell.
    except ValueError:
        pass
    return True


@contextlib.contextmanager
def _explaining_failures(file: pathlib.Path) -> Iterator[None]:
    """Turns failures of the code of a user's file into a UserError with the line.

    What the code prints goes to standard error, since a command may print its result,
    such as JSON, on standard output.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except UserError:
        raise
    except ImportError as error:
        # The configs of versions before 0.2 imported the defaults from the checkout.
        if (error.name or "").partition(".")[0] != "configs":
            raise UserError(f"{file} cannot be imported: {error}.") from None
        raise UserError(
            f"{file}: {error}. Import the defaults as resnet_jax.config.defaults, and"
            ' load a recipe with resnet_jax.config.load(RECIPES / "r50.py").'
        ) from None
    except (Exception, SystemExit) as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        if innermost.startswith(f"{PACKAGE}{os.sep}") or file.parent == RECIPES:
            raise
        raise UserError(_problem_in(error, file)) from None


def _problem_in(error: BaseException, file: pathlib.Path) -> str:
    """Returns a sentence about the failure of a user's file, with the line."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(file)]
    place = f"{file}, line {lines[-1]}" if lines else str(file)
    if isinstance(error, SystemExit):
        return f"{place}: The code ends the program; a config must return from it."
    library = str(pathlib.Path(ml_collections.__file__).parent)
    if not frames[-1].filename.startswith(library):
        text = " ".join(str(error).split())
        # The code may have failed in a module of the user's that it calls.
        last = frames[-1]
        origin = f" (in {last.filename}, line {last.lineno})"
        origin = "" if last.filename == str(file) else origin
        return f"{place}: {type(error).__name__}: {text[:300]}{origin}"
    reason = " ".join(str(error.args[0]).split()) if error.args else repr(error)
    if missing := re.search('Key "(.*?)" does not exist', reason):
        keys = {
            part for key in flatten(defaults.get_config()) for part in key.split(".")
        }
        reason = f"There is no key {missing[1]!r}.{nearest(missing[1], sorted(keys))}"
    return f"{place}: {reason[:300]}"


def choose(variant: str, known: Collection[str]) -> int:
    """Returns the index of a recipe's variant among its variants.

    Args:
      variant: The variant, as the user wrote it after the file's name and a colon.
      known: All variants of the recipe.

    Raises:
      UserError: The recipe has no such variant; the message lists all of them.

    Examples:
      >>> choose("a2", ["a1", "a2", "a3"])
      1
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

    Args:
      decay: The decay rate that torchvision's command line takes.
      batch_size: Images per step, over all devices.
      every: The number of steps between two updates of the EMA.
      epochs: The length of the run in epochs.

    Examples:
      >>> round(rescaled_ema_decay(0.99998, batch_size=1024, every=32, epochs=600), 6)
      0.998908
    """
    return 1 - min(1.0, (1 - decay) * batch_size * every / epochs)
