"""The summary of a run names its ghost batches where there is batch norm."""

import pathlib
import re

import pytest

from resnet_jax.training.summary import summary
from tests.helpers import tiny
from tests.helpers.pictures import write_folder


@pytest.mark.parametrize(
    ("norm", "row"),
    [("batch", "ghost batches of 2 images, 8 a batch"), ("group", "none")],
)
def test_the_summary_names_the_ghost_batches_of_batch_norm(norm, row):
    changes = {"model.overrides.norm": norm, "model.overrides.norm_groups": 8}
    text = summary(tiny.setup(changes), pathlib.Path("runs"))
    assert re.search(r"^batch norm: +(.*)$", text, re.MULTILINE)[1] == row


def rows_of(experiment) -> dict[str, str]:
    """Returns the rows of a summary, each in one line."""
    text = re.sub(r"\n {12}", " ", summary(experiment, pathlib.Path("runs")))
    return dict(re.findall(r"^([\w ]+): +(.*)$", text, re.M))


def test_the_summary_has_the_number_of_images_of_each_class(tmp_path):
    sizes = {"a class": 9, "b": 2, "c": 1200}
    images = {f"{name}/{i}.png": b"" for name, n in sizes.items() for i in range(n)}
    source = write_folder(tmp_path, images)
    changes = {"data.source": source, "data.eval_split": "", "data.cache": "none"}
    row = rows_of(tiny.setup(changes))["classes"]
    assert row == (
        "training / eval images of each class: a class 7 / 2, b 1 / 1, c 960 / 240"
    )


def test_the_summary_of_many_classes_has_the_extremes(tmp_path):
    images = {f"{c:02}/{i}.png": b"" for c in range(51) for i in range(2 + c)}
    source = write_folder(tmp_path, images)
    changes = {"data.source": source, "data.eval_split": "", "data.cache": "none"}
    row = rows_of(tiny.setup(changes))["classes"]
    assert row.endswith(
        "class: smallest 00 1 / 1, median 25 22 / 5, largest 50 42 / 10"
    )


def test_no_images_are_read_for_the_summary():
    assert "classes" not in rows_of(tiny.setup())
