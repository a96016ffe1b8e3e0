"""ArrayRecord files, which are the shards of prepared data sets, and their metadata.

Paths are `pathlib`'s: ArrayRecord's writer and `fsync` need a local file system.
"""

import json
import os
import pathlib
import shlex
from collections.abc import Iterable, Iterator

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from resnet_jax.errors import UserError
from resnet_jax.persistence import storage

# One record per group, as tfds writes: any record can be read without its neighbours.
OPTIONS = "group_size:1"
# The file beside the shards that this project wrote. Its `command` writes them again
# when the directory, which may have been moved, is appended to it; `note` says how the
# images were re-encoded; `examples` is a checksum of their names and labels.
RECORD = "prepared.json"


def write_shard(
    path: pathlib.Path, records: Iterable[bytes], length: int, scratch: pathlib.Path
) -> None:
    """Writes a shard, and moves it into place when it is complete.

    Args:
      path: The path of the shard.
      records: The records to write.
      length: The expected number of records.
      scratch: A directory on the same disk, for the unfinished file.

    Raises:
      OSError: The disk does not take the file.
      RuntimeError: ArrayRecord cannot write the file.
      ValueError: There are more or fewer records.
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
        # The content is on the disk before the name: an existing shard is complete.
        storage.commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_shard(path: pathlib.Path) -> Iterator[bytes | RuntimeError]:
    """Yields the records of a shard in order, or an error for an unreadable one."""
    reader = ArrayRecordReader(str(path))
    for index in range(reader.num_records()):
        try:
            yield reader.read([index])[0]
        except RuntimeError as error:
            yield error


def damage(path: str | os.PathLike, length: int | None = None) -> str:
    """Returns why a shard cannot be opened, or an empty string if it can.

    It reads only the end of the file.

    Args:
      path: The path of the shard.
      length: The expected number of records; None if any number is right.

    Raises:
      UserError: The path is not UTF-8; see `check_path`.
    """
    check_path(path)
    if not os.path.exists(path):
        return "it is missing"
    reader = ArrayRecordReader(os.fspath(path))
    # A reader that is not ok must not be closed: that raises.
    if not reader.ok():
        return "it is truncated or not an ArrayRecord file"
    records = reader.num_records()
    reader.close()
    if length is not None and records != length:
        return f"it holds {records:,} records, not {length:,}"
    return ""


def check_path(path: str | os.PathLike) -> None:
    """Checks that ArrayRecord can open a path, which it takes as a text.

    Raises:
      UserError: The path is not UTF-8.
    """
    if not is_utf8(os.fspath(path)):
        raise UserError(
            f"{os.fspath(path)!r} is not UTF-8, which the paths of ArrayRecord files"
            " must be; rename the folder, or choose another one."
        )


def is_utf8(text: str) -> bool:
    """Returns whether a name of a file, as Python decodes it, is UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_record(directory: str | os.PathLike) -> dict[str, str]:
    """Returns the content of `RECORD` in a directory; empty if there is none.

    Raises:
      UserError: The file is damaged.
    """
    try:
        return storage.read_object(storage.path_of(directory) / RECORD)
    except FileNotFoundError:
        return {}
    except UserError as error:
        raise UserError(
            f"{error} It says how the data set was made: prepare the data set again, or"
            " delete that file."
        ) from None


def repair(shard: str | os.PathLike) -> str:
    """Returns the shell command that writes a damaged shard again."""
    shard = pathlib.Path(shard).absolute()
    directory = shard.parent
    if command := read_record(directory).get("command"):
        return (
            f"rm -f {shlex.quote(str(shard))} && {command}{shlex.quote(str(directory))}"
        )
    # tfds wrote the shard, to ROOT/NAME[/CONFIG]/VERSION. It writes whole data sets.
    info = json.loads((directory / "dataset_info.json").read_text())
    names = [info["name"], *filter(None, [info.get("configName")])]
    words = [f"tfds:{'/'.join(names)}", f"--data_dir={directory.parents[len(names)]}"]
    return (
        f"rm -r {shlex.quote(str(directory))} &&"
        f" python -m resnet_jax.prepare {shlex.join(words)}"
    )
