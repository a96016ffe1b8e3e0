"""Weights that others have trained reach their published accuracy on the test set.

The test set of CIFAR-10 is too large for the repository. CIFAR10 names a directory of
PNGs, DIRECTORY/CLASS/IMAGE.png, with the classes under their usual English names:

CIFAR10=DIRECTORY pytest -m long tests/e2e/test_published_accuracy.py
"""

import os
import pathlib

import numpy as np
import pytest

import resnet_jax
from tests.helpers.real_data import real_data

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("name", "published"), [("resnet20-12fca82f", 91.73), ("resnet32-d509ac18", 92.63)]
)
def test_the_weights_of_akamaster_reach_the_accuracy_of_its_readme(name, published):
    weights = real_data("cifar-resnet-weights") / f"{name}.th"
    pytest.importorskip("torch", reason="the weights are files of torch")
    if "CIFAR10" not in os.environ:
        pytest.skip("CIFAR10 does not name a directory with the test set")
    classes = sorted(pathlib.Path(os.environ["CIFAR10"]).iterdir())
    files = [(file, k) for k, folder in enumerate(classes) for file in folder.iterdir()]
    assert (len(classes), len(files)) == (10, 10_000)
    logits = resnet_jax.load(weights).logits([str(file) for file, _ in files])
    correct = np.argmax(logits, axis=-1) == [label for _, label in files]
    assert round(100 * np.mean(correct), 2) == published
