"""The opening of the data of a config."""

import numpy as np
import pytest

from resnet_jax.data.derived_sources import labels_of
from resnet_jax.errors import UserError
from resnet_jax.prepare import main
from resnet_jax.training.datasets import (
    open_examples,
    open_splits,
    open_train_split,
    resolve_splits,
)
from tests.helpers import tiny
from tests.helpers.pictures import encode, noise, write_folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_split": "x"}, "train_split='x' of data.source='fake:10:64': There"),
        ({"eval_split": "test[:0]"}, "eval_split='test.:0.' of data.source='fake:"),
        (
            {"eval_source": "digits", "eval_split": "val"},
            "eval_split='val' of data.eval_source='digits': There is no split 'val'",
        ),
        # The name of the split is part of the source.
        (
            {"source": "mix:digits@x", "train_split": "train"},
            "train_split='train' of data.source='mix:digits@x': There is no split 'x'",
        ),
    ],
)
def test_the_error_of_a_split_names_its_keys(changes, message):
    config = tiny.config({f"data.{key}": value for key, value in changes.items()})
    with pytest.raises(UserError, match=f"^data.{message}"):
        open_examples(config)


JPEG = encode(noise(0, 8, 8), "JPEG")


def folder_of(root, *splits: str, images: int = 5) -> str:
    """Writes a folder with some pictures of two classes in each split."""
    names = [f"{split}/{name}" for split in splits or ("",) for name in ("cat", "dog")]
    files = [
        f"{name}/{index}.jpg".lstrip("/") for name in names for index in range(images)
    ]
    return write_folder(root, dict.fromkeys(files, JPEG))


def resolved(source: str, **changes: str) -> tuple[str, str]:
    """Returns the names of the splits of a config whose eval split is empty."""
    data = {"source": source, "train_split": "train", "eval_split": ""} | changes
    config = tiny.config({f"data.{key}": value for key, value in data.items()})
    found = resolve_splits(config).data
    # Only the names change.
    assert config.data.eval_split == data["eval_split"]
    return found.train_split, found.eval_split


@pytest.mark.parametrize(
    ("splits", "changes", "expected"),
    [
        (("train", "val", "test"), {}, ("train", "val")),
        (("train", "test", "valid"), {}, ("train", "valid")),
        (("train", "validation", "eval"), {}, ("train", "validation")),
        (("train", "test"), {}, ("train", "test")),
        (("training", "eval"), {}, ("training", "eval")),
        (("Training", "Testing"), {}, ("Training", "Testing")),
        (("TRAIN", "VAL"), {}, ("TRAIN", "VAL")),
        (("train",), {}, ("train", "held_out")),
        (("train", "extra"), {}, ("train", "held_out")),
        ((), {}, ("train", "held_out")),
        # What is trained on is not evaluated.
        (("train", "val"), {"train_split": "train+val"}, ("train+val", "held_out")),
        (("train", "val"), {"train_split": "all"}, ("all", "held_out")),
        (
            ("train", "val", "test"),
            {"train_split": "train+val[:5]"},
            ("train+val[:5]", "test"),
        ),
        # What is named is kept.
        (("train", "val"), {"eval_split": "train"}, ("train", "train")),
        (("train", "val"), {"eval_split": "held_out"}, ("train", "held_out")),
    ],
)
def test_an_empty_eval_split_is_the_usual_one_that_a_folder_has(
    splits, changes, expected, tmp_path
):
    assert resolved(folder_of(tmp_path, *splits), **changes) == expected


def test_the_eval_split_of_other_sources_is_their_usual_one(tmp_path):
    assert resolved("digits") == ("train", "test")
    assert resolved("fake:10:64") == ("train", "validation")
    # It need not be on disk.
    assert resolved("tfds:cifar10") == ("train", "test")
    folder_of(tmp_path, "a")
    table = "path,label,split\na/cat/0.jpg,cat,Train\na/cat/1.jpg,cat,Valid\n"
    (tmp_path / "t.csv").write_text(table)
    assert resolved(f"csv:{tmp_path}/t.csv") == ("train", "valid")
    main(["prepare", folder_of(tmp_path / "f", "train", "test"), "--num_workers=1"])
    packed = f"tfds:{tmp_path}/f_arrayrecord"
    assert resolved(packed) == ("train", "test")
    assert resolved(packed, train_split="all") == ("all", "held_out")


def test_a_split_without_the_classes_is_named_and_not_evaluated(tmp_path, caplog):
    source = folder_of(tmp_path, "train")
    write_folder(tmp_path, {"test/1.jpg": JPEG})
    assert resolved(source) == ("train", "held_out")
    assert "The split test of folder:" in caplog.text


def test_the_eval_split_of_another_source_is_its_usual_or_its_only_one(tmp_path):
    source = folder_of(tmp_path / "a", "train", "val")
    for name, splits, expected in (
        ("b", ("train", "test"), "test"),
        ("c", (), "train"),
    ):
        other = folder_of(tmp_path / name, *splits)
        # A run that held images out can be evaluated on another source.
        for eval_split in ("", "held_out"):
            changes = {"eval_source": other, "eval_split": eval_split}
            assert resolved(source, **changes) == ("train", expected)
    other = folder_of(tmp_path / "d", "train", "extra")
    with pytest.raises(UserError, match=r"no split with a usual name .* extra, train"):
        resolved(source, eval_source=other)


def test_a_combination_does_not_know_its_eval_split(tmp_path):
    with pytest.raises(UserError, match=r"eval_split is empty, and .*mix:digits.*give"):
        resolved("mix:digits,digits@test")


def held_out_config(source: str, changes=None):
    data = {"data.source": source, "data.eval_split": "", "data.channels": 3}
    return resolve_splits(tiny.config(data | (changes or {})))


def test_images_are_held_out_of_every_kind_of_source(tmp_path):
    folder = folder_of(tmp_path / "f", images=10)
    lines = [f"f/{c}/{i}.jpg,{c}" for c in ("cat", "dog") for i in range(10)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *lines]))
    single = folder_of(tmp_path / "g", "train", images=10)
    main(["prepare", single, f"--out={tmp_path}/packed", "--num_workers=1"])
    for source in (folder, single, f"csv:{tmp_path}/t.csv", f"tfds:{tmp_path}/packed"):
        for fraction, number in ((0.2, 2), (0.5, 5)):
            train, evaluated = open_splits(
                held_out_config(source, {"data.eval_fraction": fraction})
            )
            assert np.bincount(labels_of(evaluated)).tolist() == [number] * 2
            assert np.bincount(labels_of(train)).tolist() == [10 - number] * 2
    config = held_out_config("digits", {"data.train_split": "train+test"})
    assert [len(part) for part in open_splits(config)] == [1438, 359]


def test_shots_and_balance_apply_to_what_is_not_held_out(tmp_path):
    folder = folder_of(tmp_path, images=10)
    changes = {"data.shots": 3, "data.balance": True}
    train, evaluated = open_splits(held_out_config(folder, changes))
    assert (train.sizes, len(evaluated)) == ((3, 3), 4)
    names = [{part.name(i) for i in range(len(part))} for part in (train, evaluated)]
    assert not names[0] & names[1]
    # The eval split is not needed.
    config = held_out_config(folder, changes)
    assert open_train_split(config).digest() == train.digest()
    with pytest.raises(UserError, match=r"shots=9, but .* has only 8 of class 'cat'"):
        open_splits(held_out_config(folder, {"data.shots": 9}))


def test_the_error_of_a_missing_split_says_how_to_hold_images_out(tmp_path):
    source = folder_of(tmp_path)
    config = tiny.config({"data.source": source, "data.eval_split": "validation"})
    with pytest.raises(
        UserError, match=r"Known: train\. .* --config.data.eval_split= "
    ):
        open_splits(config)
