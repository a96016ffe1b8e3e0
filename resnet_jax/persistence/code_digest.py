"""Checksum of the package's source code."""

import hashlib
import pathlib
from collections.abc import Callable

PACKAGE = pathlib.Path(__file__).parents[1]
# Recipes, which an installed package holds, are compared as configs.
RECIPES = PACKAGE / "configs"


def digest(aside: Callable[[str], bool] = lambda name: False) -> str:
    """Returns a checksum of the source code, wherever it is installed.

    Args:
      aside: Returns whether a file, such as `resnet_jax/training/step.py`, is left
        out.
    """
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        if RECIPES in path.parents:
            continue
        name = path.relative_to(PACKAGE.parent).as_posix()
        if not aside(name):
            found.update(name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
