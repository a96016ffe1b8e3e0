"""The summary of a run names its ghost batches where there is batch norm."""

import pathlib
import re

import pytest

from resnet_jax.training.summary import summary
from tests.helpers import tiny


@pytest.mark.parametrize(
    ("norm", "row"),
    [("batch", "ghost batches of 2 images, 8 a batch"), ("group", "none")],
)
def test_the_summary_names_the_ghost_batches_of_batch_norm(norm, row):
    changes = {"model.overrides.norm": norm, "model.overrides.norm_groups": 8}
    text = summary(tiny.setup(changes), pathlib.Path("runs"))
    assert re.search(r"^batch norm: +(.*)$", text, re.MULTILINE)[1] == row
