"""Tables of images: their rows, their classes, and the mistakes in them by line."""

import os
import pathlib

import pytest

from resnet_jax.data.csv_source import csv_splits, split_table
from resnet_jax.data.derived_sources import check_same_classes, hold_out, with_classes
from resnet_jax.data.sources import open_source
from resnet_jax.errors import UserError
from resnet_jax.prepare import main
from tests.helpers.pictures import encode, noise, write_folder

PICTURES = {
    f"{name}.png": encode(noise(i, 8, 8), "PNG") for i, name in enumerate("abc")
}


@pytest.fixture
def table(tmp_path):
    """Returns a function that writes a table beside three pictures."""
    write_folder(tmp_path, PICTURES)

    def write(text: str | bytes) -> str:
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "t.csv").write_bytes(content)
        return f"csv:{tmp_path}/t.csv"

    return write


def rows(source) -> list[tuple[str, str]]:
    """Returns the name of each image's file, and its class."""
    return [
        (os.path.basename(source.name(i)), source.classes[source[i][1]])
        for i in range(len(source))
    ]


@pytest.mark.parametrize(
    "text",
    [
        "path,label\na.png,x\nb.png,y\nc.png,x\n",
        "path,label\r\na.png,x\r\nb.png,y\r\nc.png,x\r\n",
        b"\xef\xbb\xbfpath,label\na.png,x\nb.png,y\nc.png,x",
        'label,size,path\nx,8,"a.png"\ny,8,b.png\n"x",,c.png\n',
        "Path, Label ,split\na.png, x ,train\nb.png,y,Train\nc.png,x,train\n",
        "path,label\n\na.png,x\n,\nb.png,y\n./c.png,x,\n",
    ],
)
def test_a_table_has_an_image_in_each_row(text, table):
    source = open_source(table(text), "train")
    assert rows(source) == [("a.png", "x"), ("b.png", "y"), ("c.png", "x")]
    assert source[1] == (PICTURES["b.png"], 1)
    assert source.classes == ("x", "y")


def test_paths_are_relative_to_the_table_or_absolute(tmp_path, monkeypatch):
    folder = tmp_path / "my, pictures"
    write_folder(folder, PICTURES)
    text = f'path,label\n"my, pictures/a.png",x\n"{folder}/b.png",y\n'
    (tmp_path / "t.csv").write_text(text)
    monkeypatch.chdir(tmp_path)
    for source in ("csv:t.csv", f"csv:{tmp_path}/t.csv"):
        assert rows(open_source(source, "train")) == [("a.png", "x"), ("b.png", "y")]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("10", "9", "1"), ("1", "9", "10")),
        (("10", "9", "x"), ("10", "9", "x")),
        (("2", "-1", "02"), ("-1", "02", "2")),
        (("b", "B", "a"), ("B", "a", "b")),
    ],
)
def test_classes_are_in_the_order_of_numbers_or_of_the_alphabet(labels, classes, table):
    lines = [f"{name},{x}" for name, x in zip(PICTURES, labels, strict=True)]
    source = open_source(table("\n".join(["path,label", *lines])), "train")
    assert source.classes == classes


def test_the_column_split_names_the_splits(table):
    text = "path,label,split\na.png,x,Training\nb.png,x,fold2\nc.png,x,VAL\n"
    source = table(text)
    assert csv_splits(source[4:]) == ["training", "fold2", "val"]
    assert rows(open_source(source, "fold2")) == [("b.png", "x")]
    assert rows(open_source(source, "val+training")) == [("c.png", "x"), ("a.png", "x")]
    with pytest.raises(UserError, match=r"no split 'train'\. Did you mean training"):
        open_source(source, "train")


HEADER = "path,label,split\na.png,x,train\n"
MISTAKES = {
    "no column": ("file,label\na.png,x\n", "line 1: there is no column 'path', but"),
    "semicolons": ("path;label\na.png;x\n", "line 1: .* separated by commas"),
    "nothing": ("", "line 1: there is no column 'path', but nothing"),
    "only a header": ("path,label\n", "has no images"),
    "two columns": ("path,label,Label\na.png,x,y\n", "line 1: two columns .* 'label'"),
    "missing file": (f"{HEADER}d.png,x,train\n", "line 3: .*/d.png does not exist"),
    "a folder": (f"{HEADER}.,x,train\n", "line 3: .* is not a file"),
    "empty label": (f"{HEADER}b.png, ,train\n", "line 3: the label is empty"),
    "empty split": (f"{HEADER}b.png,x\n", "line 3: the split is empty"),
    "empty path": (f"{HEADER},x,train\n", "line 3: the path is empty"),
    "unknown split": (f"{HEADER}b.png,x,trian\n", "line 3: .*'trian'.* mean train"),
    "a comma": (f"{HEADER}b.png,x,train,y\n", "line 3: there are 4 fields for 3"),
    "two labels": (f"{HEADER}\n./a.png,y,val\n", "line 4: .*'y', but 'x' in line 2"),
    "an open quote": (f'{HEADER}"b.png,x,train\n', "line 3: .*quotes belong"),
    "another encoding": (
        "path,label\na.png,é\n".encode("latin1"),
        "not encoded in UTF-8",
    ),
    "a spreadsheet": ("path,label\na.png,x\n".encode("utf-16"), "not encoded in UTF-8"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_a_table_is_one_sentence_with_the_line(case, table, tmp_path):
    text, message = MISTAKES[case]
    with pytest.raises(UserError, match=message) as raised:
        open_source(table(text), "train")
    assert str(raised.value).startswith(f"{tmp_path}/t.csv")
    assert "\n" not in str(raised.value)


def test_a_table_that_is_not_there_is_reported(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv cannot be read: No such file"):
        open_source(f"csv:{tmp_path}/none.csv", "train")


def test_a_label_that_the_training_data_lack_is_reported_with_its_line(table, tmp_path):
    train = open_source(
        write_folder(tmp_path / "f", {"x/1.png": PICTURES["a.png"]}), "train"
    )
    text = "path,label,split\na.png,x,val\nb.png,new,val\nc.png,new,test\n"
    evaluated = open_source(table(text), "val")
    with pytest.raises(
        UserError, match=r"t\.csv@val \(line 3\) is 'new', which is not"
    ):
        with_classes(evaluated, train.classes)
    with pytest.raises(UserError, match=r"'new' is in .*t\.csv@val.* \(line 3\) but"):
        check_same_classes(train, open_source(table(text), "val[:100%]"))


def test_ten_thousand_rows_ask_for_each_folder_once(tmp_path, monkeypatch):
    write_folder(tmp_path, {f"{i}/1.png": b"" for i in range(10)})
    for folder in range(10):
        for index in range(2, 1001):
            os.link(tmp_path / f"{folder}/1.png", tmp_path / f"{folder}/{index}.png")
    lines = [f"{i}/{j}.png,{i}" for i in range(10) for j in range(1, 1001)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *lines]))
    listed = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scan(path))
    monkeypatch.setattr(os.path, "isfile", None)
    source = open_source(f"csv:{tmp_path}/t.csv", "train")
    assert (len(source), len(listed)) == (10_000, 10)


def test_the_table_of_a_split_is_a_source_with_the_same_split(tmp_path):
    names = [f'{name}/{i} ,".png' for name in ("a b", "c") for i in range(9)]
    files = dict.fromkeys(names, PICTURES["a.png"])
    source = open_source(write_folder(tmp_path, files), "train")
    parts = dict(zip(("train", "val"), hold_out(source, 0.3, 1), strict=True))
    (tmp_path / "split.csv").write_bytes(split_table(*parts.values()))
    for split, part in parts.items():
        again = open_source(f"csv:{tmp_path}/split.csv", split)
        assert rows(again) == rows(part)
        assert [again.name(i) for i in range(len(again))] == [
            part.name(i) for i in range(len(part))
        ]
    digits = hold_out(open_source("digits", "train"), 0.3, 1)
    lines = split_table(*digits).decode().splitlines()
    # The digits have no files; their names are those of messages.
    first = digits[0]
    assert lines[1] == f"{first.name(0)},{first[0][1]},train"


def test_verify_reads_the_images_of_all_splits_of_a_table(table, tmp_path, capsys):
    source = table("path,label,split\na.png,x,train\nb.png,y,val\n")
    main(["prepare", "verify", source, "--num_workers=1"])
    assert "All 2 images of" in capsys.readouterr().out
    pathlib.Path(tmp_path, "b.png").write_bytes(PICTURES["b.png"][:60])
    with pytest.raises(UserError, match="has 1 problem"):
        main(["prepare", "verify", source, "--num_workers=1"])
    assert f"{tmp_path}/b.png" in capsys.readouterr().out
