"""Image files that a user gives: paths, folders, patterns and lists of paths."""

import glob
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from resnet_jax.console import output
from resnet_jax.data.image_files import (
    describe,
    find_images,
    kind_of_other,
    starts_as_image,
)
from resnet_jax.errors import UserError
from resnet_jax.persistence import storage

# The location that stands for a list of paths on standard input.
STANDARD_INPUT = "-"


class GivenImages:
    """The paths of the images that locations stand for, in the order of the locations.

    A location is an image file, a folder, whose images and those of its subfolders are
    taken, a pattern such as `PHOTOS/**/*.jpg`, or `-`, which is a list of files and
    folders on standard input. Locations are looked up one after the other, as they are
    reached. A path that exists is never a pattern.

    Iterating yields a UserError in the place of each location that gives no path.

    Attributes:
      total: The number of paths and errors, or None as long as it is not known.
    """

    total: int | None

    def __init__(self, locations: Sequence[str]):
        if locations.count(STANDARD_INPUT) > 1:
            raise UserError("Standard input (-) can be read only once; give one -.")
        self._locations = locations
        only_files = all(map(os.path.isfile, locations))
        self.total = len(locations) if only_files else None

    def __iter__(self) -> Iterator[str | UserError]:
        count = 0
        for place, location in enumerate(self._locations, 1):
            if location == STANDARD_INPUT:
                items = _listed()
            else:
                paths = _paths_of(location)
                if place == len(self._locations):
                    self.total = count + len(paths)
                items = iter(paths)
            for item in items:
                count += 1
                yield item
        self.total = count


def _listed() -> Iterator[str | UserError]:
    """Yields the paths of the list on standard input."""
    empty = True
    try:
        with open(0, "rb", closefd=False) as stream:
            for path in listed_paths(stream):
                empty = False
                # Names from a list, such as that of `find`, are not patterns.
                yield from _paths_of(path, patterns=False)
    except UserError as error:
        yield error
    else:
        if empty:
            yield UserError(
                "Standard input names no images; give one path per line, as find PHOTOS"
                " -name '*.jpg' prints them."
            )


def listed_paths(stream: io.BufferedIOBase) -> Iterator[str]:
    """Yields the paths of a list as they arrive.

    Paths end with line breaks (of any system), or with null bytes, as `find -print0`
    writes them, if the first part of the list has one. Empty lines are skipped.

    Args:
      stream: The stream, such as that of standard input.

    Raises:
      UserError: The stream cannot be read, or it is an image.
    """
    rest = separator = b""
    is_start = True
    try:
        while chunk := stream.read1(2**16):
            if is_start:
                if starts_as_image(chunk):
                    raise UserError(
                        "Standard input is an image and not a list of paths; give"
                        " /dev/stdin instead of - to classify it."
                    )
                chunk = chunk.removeprefix(b"\xef\xbb\xbf")
                is_start = False
            rest += chunk
            if not separator:
                found = [x for x in (b"\0", b"\n") if x in rest]
                separator = found[0] if found else b""
            if separator:
                *paths, rest = rest.split(separator)
                for path in paths:
                    yield from _path_in(path, separator)
        yield from _path_in(rest, separator)
    except OSError as error:
        raise UserError(
            f"Standard input cannot be read: {error.strerror}; give a list of paths."
        ) from None


def _path_in(line: bytes, separator: bytes) -> Iterator[str]:
    if separator != b"\0":
        if line.endswith(b"\r") and not os.path.lexists(line):
            line = line[:-1]
        if not line.strip():
            return
    if line:
        yield os.fsdecode(line)


def _paths_of(location: str, patterns: bool = True) -> list[str | UserError]:
    """Returns the paths for which a location stands, or the reason for none."""
    try:
        path = storage.path_of(location)
        text = os.fspath(path)
        if storage.is_remote(path):
            return [text]
        if os.path.isdir(path):
            return [*_in_folder(text)]
        if patterns and glob.escape(text) != text and not os.path.lexists(path):
            return [*_matches(text)]
        return [text]
    except UserError as error:
        return [error]


def _in_folder(folder: str) -> list[str]:
    images, left_out = find_images(folder)
    others = describe(left_out)
    if not images:
        raise UserError(f"{folder} holds no images{others and f' ({others})'}.")
    if others:
        output.note(f"{folder}: {others}.")
    return [os.path.join(folder, image) for image in images]


def _matches(pattern: str) -> list[str]:
    """Returns the images that match a pattern, and those in folders that match it."""
    # Folders whose real names have brackets are taken as they are.
    literal, rest = pattern, ""
    while literal and not os.path.lexists(literal):
        literal, slash, last = literal.rpartition("/")
        rest = f"{slash}{last}{rest}"
    # Several matches may lead to one path, as a folder and a file in it.
    paths: dict[str, None] = {}
    left_out: Counter[str] = Counter()
    for match in sorted(glob.glob(glob.escape(literal) + rest, recursive=True)):
        if os.path.isdir(match):
            images = find_images(match).paths
            paths |= dict.fromkeys(os.path.join(match, image) for image in images)
        elif kind := kind_of_other(match):
            left_out[kind] += 1
        else:
            paths[match] = None
    others = describe(left_out)
    if not paths:
        reason = f" ({others})" if others else ""
        raise UserError(f"No image matches the pattern {pattern}{reason}.")
    if others:
        output.note(f"{pattern}: {others}.")
    return list(paths)
