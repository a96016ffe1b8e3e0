"""Ways to damage image files and the shards of prepared data sets."""

import pathlib

import numpy as np

from tests.helpers.pictures import encode, noise

JPEG = encode(noise(0, 60, 40), "JPEG", quality=90)
PNG = encode(noise(0, 60, 40), "PNG")


def _truncate(file: bytes, rng: np.random.Generator) -> bytes:
    return file[: rng.integers(len(file))]


def _flip_bytes(file: bytes, rng: np.random.Generator) -> bytes:
    array = np.frombuffer(file, np.uint8).copy()
    places = rng.integers(0, len(array), rng.integers(1, 10))
    array[places] ^= rng.integers(1, 256, len(places), np.uint8)
    return array.tobytes()


def _flip_bytes_of_header(file: bytes, rng: np.random.Generator) -> bytes:
    return _flip_bytes(file[:100], rng) + file[100:]


def _cut_the_middle_out(file: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(0, len(file), 2))
    return file[:start] + file[end:]


def _continue_as_another_kind(file: bytes, rng: np.random.Generator) -> bytes:
    place = rng.integers(len(file))
    return file[:place] + (PNG if file[:2] == JPEG[:2] else JPEG)[place:]


def _append(file: bytes, rng: np.random.Generator) -> bytes:
    return file + rng.bytes(50)


# Functions that take the bytes of an image file and a generator of random numbers, and
# return the bytes of a broken file.
BREAKAGES = (
    *(_truncate, _flip_bytes, _flip_bytes_of_header),
    *(_cut_the_middle_out, _continue_as_another_kind, _append),
)


def truncate(path: pathlib.Path) -> None:
    """Removes the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flip_byte(path: pathlib.Path) -> None:
    """Inverts a byte of the first JPEG in a shard."""
    content = bytearray(path.read_bytes())
    content[content.find(b"\xff\xd8\xff") + 300] ^= 0xFF
    path.write_bytes(content)
