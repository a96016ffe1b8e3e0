"""ArrayRecord files, the shards of prepared data sets, and what is kept beside them."""

import json
import os
import pathlib
import shlex
from collections.abc import Iterable, Iterator

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

# One record a group, so that any of them is read alone; what tfds writes, too.
OPTIONS = "group_size:1"
# Lies beside the shards that this project wrote: `command`, which writes them again if
# the directory, which may have been moved, is put behind it; `note`, what was done to
# the images; `examples`, a checksum of their names and labels.
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
    for index in range(reader.num_records()):
        try:
            yield reader.read([index])[0]
        except RuntimeError as error:
            yield error


def damage(path: str | os.PathLike, length: int | None = None) -> str:
    """Why a shard cannot be opened, from its end alone; empty if it can.

    Args:
      path: the shard.
      length: how many records it should hold; None: any number.
    """
    if not os.path.exists(path):
        return "it is missing"
    reader = ArrayRecordReader(os.fspath(path))
    # A reader that is not ok must not be closed: that raises.
    if not reader.ok():
        return "it is truncated or no ArrayRecord"
    found = reader.num_records()
    reader.close()
    if length is not None and found != length:
        return f"it holds {found:,} records, not {length:,}"
    return ""


def read_record(directory: str | os.PathLike) -> dict[str, str]:
    """What `RECORD` in a prepared directory says; empty if there is none."""
    path = pathlib.Path(directory) / RECORD
    return json.loads(path.read_text()) if path.exists() else {}


def repair(shard: str | os.PathLike) -> str:
    """The shell command that writes a damaged shard of a prepared directory again."""
    shard = pathlib.Path(shard).absolute()
    directory = shard.parent
    if command := read_record(directory).get("command"):
        return (
            f"rm -f {shlex.quote(str(shard))} && {command}{shlex.quote(str(directory))}"
        )
    # tfds wrote it, to ROOT/NAME[/CONFIG]/VERSION, and writes all or nothing.
    info = json.loads((directory / "dataset_info.json").read_text())
    names = [info["name"], *filter(None, [info.get("configName")])]
    words = [f"tfds:{'/'.join(names)}", f"--data_dir={directory.parents[len(names)]}"]
    return (
        f"rm -r {shlex.quote(str(directory))} &&"
        f" python -m resnet_jax.prepare {shlex.join(words)}"
    )
