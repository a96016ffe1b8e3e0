"""A table of images: a CSV file with the path, the label and the split of each."""

import csv
import dataclasses
import difflib
import functools
import io
import os
import pathlib
import re
from collections.abc import Iterator, Sequence

from resnet_jax.data.derived_sources import labels_of
from resnet_jax.data.folder_source import ONLY_SPLIT, read_image
from resnet_jax.data.source_protocol import NamedSource, checksum
from resnet_jax.data.splits import EVAL_NAMES, TRAIN_NAMES
from resnet_jax.errors import UserError, check_known
from resnet_jax.persistence import storage

USUAL_NAMES = (*TRAIN_NAMES, *EVAL_NAMES, "evaluation")
# The columns that are read; a table may have others, and need not have a split.
COLUMNS = ("path", "label", "split")


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
      line: The number of its last line in the file, from 1 on.
      path: The path of the image, as written.
      label: The name of its class.
      split: The name of its split.
    """

    line: int
    path: str
    label: str
    split: str


class CsvSource:
    """One split of a table of images, a CSV file with the header `path,label,split`.

    The column `split` may be missing, and other columns are ignored. Paths are relative
    to the folder of the file, or absolute. Classes are numbered in alphabetical order,
    or by number if all of their names are whole numbers.

    Attributes:
      title: The path of the file with the name of the split.
      classes: The names of the classes that occur in the split.
      paths: The images' paths, as written.
      labels: The images' labels.
      lines: The number of each image's line in the file.

    Raises:
      UserError: The file cannot be read, is not such a table, has no such split, or
        names an image that is missing. The message has the number of the line.

    Args:
      path: The path of the file, which may be in an object store.
      split: The name of the split.
    """

    def __init__(self, path: str, split: str):
        file = local_file(path)
        rows = read_rows(file)
        splits = list(dict.fromkeys(row.split for row in rows))
        check_known(f"split {split!r} in {file}", split, splits)
        rows = [row for row in rows if row.split == split]
        self.root = file.parent
        self.title = str(file) if splits == [ONLY_SPLIT] else f"{file}@{split}"
        self.classes = tuple(sorted_names({row.label for row in rows}))
        number = {name: label for label, name in enumerate(self.classes)}
        self.paths = [row.path for row in rows]
        self.labels = [number[row.label] for row in rows]
        self.lines = [row.line for row in rows]
        self._check_files(file)

    def _check_files(self, file: pathlib.Path) -> None:
        @functools.cache
        def names_in(folder: str) -> set[str]:
            try:
                with os.scandir(folder) as entries:
                    return {entry.name for entry in entries if entry.is_file()}
            except (OSError, ValueError):
                return set()

        # Folders are listed, since asking for each file takes long over a network.
        for index, line in enumerate(self.lines):
            path = self.name(index)
            folder, name = os.path.split(path)
            if name in names_in(folder) or os.path.isfile(path):
                continue
            problem = "is not a file" if os.path.exists(path) else "does not exist"
            raise UserError(
                f"{file}, line {line}: {path} {problem}; correct the path, which is"
                " absolute or relative to the folder of the table, or remove the line."
            )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        return read_image(self.name(index)), self.labels[index]

    def name(self, index: int) -> str:
        """Returns the path of an image."""
        return os.path.join(self.root, self.paths[index])

    def digest(self) -> str:
        """Returns a checksum of the paths, as they are written, and the labels."""
        return checksum(self.paths, self.labels)


def csv_splits(path: str) -> list[str]:
    """Returns the names of the splits of a table, in order of appearance.

    Raises:
      UserError: The file cannot be read, or is not a table of images.
    """
    return list(dict.fromkeys(row.split for row in read_rows(local_file(path))))


def local_file(path: str) -> pathlib.Path:
    """Returns the local path of a table; its folder is copied from an object store."""
    file = storage.path_of(path)
    return storage.kept_copy(file.parent).expanduser() / file.name


def read_rows(file: pathlib.Path) -> list[Row]:
    """Returns the rows of a table of images.

    Raises:
      UserError: The file cannot be read, or is not such a table.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            rows = list(_rows(file, text))
    except UnicodeDecodeError:
        raise UserError(
            f"{file} is not encoded in UTF-8; save it as CSV in UTF-8."
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from None
    if not rows:
        raise UserError(f"{file} has no images: there is no line after its header.")
    labelled: dict[str, Row] = {}
    for row in rows:
        first = labelled.setdefault(os.path.normpath(row.path), row)
        if first.label != row.label:
            raise UserError(
                f"{file}, line {row.line}: {row.path} has the label {row.label!r}, but"
                f" {first.label!r} in line {first.line}; an image has one label."
            )
    return rows


def _rows(file: pathlib.Path, text: Iterator[str]) -> Iterator[Row]:
    reader = csv.reader(text, skipinitialspace=True, strict=True)
    try:
        header = next(reader, [])
        places = _places(file, header)
        for fields in reader:
            if any(field.strip() for field in fields):
                yield _row(file, reader.line_num, fields, len(header), places)
    except csv.Error as error:
        raise UserError(
            f"{file}, line {reader.line_num}: {error}; quotes belong around a complete"
            " field, and a quote in it is written twice."
        ) from None


def _places(file: pathlib.Path, header: Sequence[str]) -> dict[str, int]:
    """Returns the index of each column, by its name."""
    names = [name.strip().casefold() for name in header]
    for name in COLUMNS:
        if names.count(name) > 1:
            raise UserError(f"{file}, line 1: two columns have the name {name!r}.")
    for name in COLUMNS[:2]:
        if name not in names:
            columns = ", ".join(header) or "nothing"
            raise UserError(
                f"{file}, line 1: there is no column {name!r}, but {columns}. The first"
                " line is path,label or path,label,split, separated by commas."
            )
    return {name: names.index(name) for name in COLUMNS if name in names}


def _row(
    file: pathlib.Path,
    line: int,
    fields: Sequence[str],
    width: int,
    places: dict[str, int],
) -> Row:
    if any(field.strip() for field in fields[width:]):
        raise UserError(
            f"{file}, line {line}: there are {len(fields)} fields for {width} columns;"
            " put a path or label with a comma in quotes."
        )
    values = {"split": ONLY_SPLIT}
    for name, place in places.items():
        values[name] = fields[place] if place < len(fields) else ""
        if not values[name].strip():
            raise UserError(f"{file}, line {line}: the {name} is empty; fill it in.")
    split = values["split"].strip()
    if split.casefold() in USUAL_NAMES:
        split = split.casefold()
    elif split.isalpha() and (
        near := difflib.get_close_matches(split.casefold(), USUAL_NAMES, 1, 0.75)
    ):
        raise UserError(
            f"{file}, line {line}: the split {split!r} is unknown. Did you mean"
            f" {near[0]}?"
        )
    return Row(line, values["path"], values["label"].strip(), split)


def sorted_names(names: set[str]) -> list[str]:
    """Returns the names of classes in the order of their labels.

    >>> sorted_names({"10", "9", "1"}), sorted_names({"10", "9", "a"})
    (['1', '9', '10'], ['10', '9', 'a'])
    """
    if all(re.fullmatch(r"[+-]?[0-9]{1,18}", name) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def split_table(train: NamedSource, evaluated: NamedSource) -> bytes:
    """Returns a table of the images of two splits, `train` and `val`.

    It is a source, if the images are files: `csv:FILE` has the same two splits. Paths
    are absolute; other images have the names that messages give them.

    Args:
      train: The images to train on, without those that are held out.
      evaluated: The images that are held out.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for split, source in ((ONLY_SPLIT, train), ("val", evaluated)):
        # One file stands for all, since asking for each takes long over a network.
        are_files = os.path.isfile(source.name(0))
        for index, label in enumerate(labels_of(source).tolist()):
            name = source.name(index)
            path = os.path.abspath(name) if are_files else name
            writer.writerow((path, source.classes[label], split))
    # A file may have a name that is not UTF-8.
    return text.getvalue().encode(errors="surrogateescape")
