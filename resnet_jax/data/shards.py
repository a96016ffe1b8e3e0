"""ArrayRecord files, the shards of prepared data sets, and what is kept beside them."""

import json
import os
import pathlib
import shlex
from collections.abc import Iterable, Iterator

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

# One record a group, so that any of them is read alone; what tfds writes, too.
OPTIONS = "group_size:1"
# Lies beside the shards that this project wrote: `command`, which writes them again,
# and `note`, what was done to the images.
RECORD = "prepared.json"


def write_shard(
    path: pathlib.Path, records: Iterable[bytes], length: int, scratch: pathlib.Path
) -> None:
    """Writes a shard, and moves it into place when it is whole.

    Args:
      path: of the shard.
      records: what goes into it.
      length: how many records there should be.
      scratch: a directory on the same disk, for the unfinished file.

    Raises:
      OSError, RuntimeError (of ArrayRecord): the disk does not take it.
      ValueError: there are more or fewer records.
    """
    partial = scratch / f"{path.name}.{os.getpid()}"
    try:
        writer = ArrayRecordWriter(str(partial), OPTIONS)
        try:
            for record in records:
                writer.write(record)
        finally:
            writer.close()
        if why := damage(partial, length):
            raise ValueError(why)
        # On the disk before it has its name: a shard that is there is whole.
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def read_shard(path: pathlib.Path) -> Iterator[bytes | RuntimeError]:
    """Every record of a shard in order, or the error where one cannot be read."""
    reader = ArrayRecordReader(str(path))
    try:
        for index in range(reader.num_records()):
            try:
                yield reader.read([index])[0]
            except RuntimeError as error:
                yield error
    finally:
        reader.close()


def damage(path: str | os.PathLike, length: int | None = None) -> str:
    """Why a shard cannot be opened, from its end alone; empty if it can.

    Args:
      path: the shard.
      length: how many records it should hold; None: any number.
    """
    if not os.path.exists(path):
        return "it is missing"
    reader = ArrayRecordReader(os.fspath(path))
    try:
        if not reader.ok():
            return "it is truncated or no ArrayRecord"
        found = reader.num_records()
    finally:
        reader.close()
    if length is not None and found != length:
        return f"it holds {found:,} records, not {length:,}"
    return ""


def read_record(directory: str | os.PathLike) -> dict[str, str]:
    """What `RECORD` in a prepared directory says; empty if there is none."""
    path = pathlib.Path(directory) / RECORD
    return json.loads(path.read_text()) if path.exists() else {}


def repair(
    directory: str | os.PathLike, shard: str | os.PathLike, otherwise: str
) -> str:
    """The shell command that writes a damaged shard of a prepared directory again.

    Args:
      directory: where the data set is.
      shard: the damaged file.
      otherwise: the command that prepares it if this project did not write it.
    """
    command = read_record(directory).get("command")
    if command:
        return f"rm -f {shlex.quote(os.fspath(shard))} && {command}"
    return f"rm -r {shlex.quote(os.fspath(directory))} && {otherwise}"
