"""The folder in which the examples of docstrings and pages run."""

import pathlib

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

import resnet_jax
from resnet_jax.config import RECIPES, load, override

# Names that the examples use besides those that they define: scikit-learn's digits,
# uint8[n, 8, 8], and their labels, int[n].
IMAGES = (load_digits().images * (255 / 16)).round().astype(np.uint8)
LABELS = load_digits().target


def fill(folder: pathlib.Path) -> None:
    """Writes the workdir of a short first run, and two pictures of digits."""
    config = load(RECIPES / "quickstart.py")
    small = "--config.model.overrides={'stage_sizes': (1, 1, 1)}"
    override(config, ["--config.total.epochs=5", small])
    (folder / "runs").mkdir()
    resnet_jax.train(config, folder / "runs" / "quickstart")
    for index, name in ((7, "seven.png"), (3, "three.png")):
        Image.fromarray(IMAGES[index]).save(folder / name)
