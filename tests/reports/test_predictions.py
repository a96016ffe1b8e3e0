"""Predictions as text, CSV and JSON."""

import csv
import io
import json
import shutil

import numpy as np
import pytest

from resnet_jax.errors import UserError
from resnet_jax.reports import predictions
from resnet_jax.reports.predictions import Row
from resnet_jax.weights.card import Prediction
from tests import fault_drill

NAMES = (
    "a,b",
    'say "c"',
    "two\nlines",
    "return\r",
    "h\u00e9\N{GRINNING FACE}",
    "=1+1",
    "",
)
LOGITS = np.float32([1 / 3, -1e-20, 123456.789])


def rows(number: int = 7, logits: np.ndarray | None = None) -> list[Row]:
    """Returns predictions of two classes whose names and paths need quotes."""
    return [
        Row(
            f"in/{name}.png",
            [Prediction(0, name, 0.75), Prediction(1, "x", 1 / 3e9)],
            logits,
        )
        for name in NAMES[:number]
    ]


def test_a_csv_reader_gets_back_paths_names_and_numbers():
    names = predictions.columns(2, classes=3)
    assert names[:3] == ["top1_name", "top1_probability", "top2_name"]
    assert names[4:] == ["logit_0", "logit_1", "logit_2"]
    lines = predictions.csv_lines(rows(logits=LOGITS), names)
    table = list(csv.DictReader(io.StringIO("\n".join(lines) + "\n", newline="")))
    assert [row["path"] for row in table] == [row.path for row in rows()]
    assert tuple(row["top1_name"] for row in table) == NAMES
    assert {float(row["top1_probability"]) for row in table} == {0.75}
    # Nine digits give each float32 back.
    assert all(np.float32(row["logit_2"]) == LOGITS[2] for row in table)
    assert float(table[0]["top2_probability"]) == pytest.approx(1 / 3e9, rel=1e-8)


def test_no_image_gives_a_table_with_its_header_and_a_document_without_images():
    assert list(predictions.csv_lines([], predictions.columns(1))) == [
        "path,top1_name,top1_probability"
    ]
    document = "\n".join(predictions.json_lines([], {"weights": "w"}))
    assert json.loads(document) == {"weights": "w", "images": []}


@pytest.mark.parametrize("number", [1, 2, 7])
def test_a_document_that_is_written_in_parts_equals_one_that_is_written_at_once(number):
    facts = {"weights": 'w"\n', "network": "resnet18"}
    given = rows(number, LOGITS)
    images = [
        {
            "file": row.path,
            "top": [prediction._asdict() for prediction in row.top],
            "logits": LOGITS.tolist(),
        }
        for row in given
    ]
    printed = "\n".join(predictions.json_lines(given, facts))
    assert printed == json.dumps({**facts, "images": images}, indent=2)


def test_an_error_of_the_first_image_comes_before_anything_is_written():
    def broken():
        raise UserError("bad")
        yield

    for lines in (
        predictions.csv_lines(broken(), predictions.columns(1)),
        predictions.json_lines(broken(), {}),
        predictions.text_lines(broken()),
    ):
        with pytest.raises(UserError, match="bad"):
            next(lines)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_on_a_full_disk_leaves_nothing_but_the_old_one(suffix, tmp_path):
    with fault_drill.small_disk(tmp_path) as disk:
        if disk is None:
            pytest.skip("mounting a small disk needs root")
        path = disk / f"p.{suffix}"
        path.write_text("old")
        (disk / "large").write_bytes(bytes(shutil.disk_usage(disk).free))
        _, _, image = rows(3, LOGITS)
        with (
            pytest.raises(UserError, match=r"No space left on device.*Free some space"),
            predictions.PredictionTable(path, 2, 3) as table,
        ):
            table.add("x.png", "cat", image.top, LOGITS)
        assert path.read_text() == "old"
        assert {file.name for file in disk.iterdir()} == {path.name, "large"}
