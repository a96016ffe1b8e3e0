"""Loads the recipes and finds the golden text of each recipe's config.

`python -m tests.helpers.golden_configs` writes the golden texts again.
"""

import pathlib

from ml_collections import ConfigDict

from resnet_jax import config
from resnet_jax.config import recipes
from resnet_jax.config.saved import as_text
from tests.helpers.runs import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))
GOLDEN = ROOT / "tests" / "golden" / "configs"
# The names of all recipes, FILE or FILE:VARIANT.
RECIPES = [name.replace(".py", "") for name, _, _ in recipes.variants()]


def load(name: str) -> ConfigDict:
    """Loads the config of a recipe, such as `rsb:a1`."""
    stem, colon, variant = name.partition(":")
    return config.load(str(ROOT / "configs" / f"{stem}.py{colon}{variant}"))


def golden(name: str) -> pathlib.Path:
    """Returns the file with the golden text of a recipe."""
    return GOLDEN / f"{name.replace(':', '.')}.txt"


if __name__ == "__main__":
    for old in GOLDEN.glob("*.txt"):
        old.unlink()
    for name in RECIPES:
        golden(name).write_text(as_text(load(name)))
