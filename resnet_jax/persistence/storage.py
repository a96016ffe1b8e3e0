"""Paths and files on file systems and in object stores.

A path of `gs://` or `s3://` is an `epath.Path` and every other one a `pathlib.Path`.
Local paths are not `epath.Path`s too because its `stat` rounds times to seconds (the
lock of a workdir compares them) and fails for users without a name, its `iterdir` hides
names that end in `~`, and its `open` cannot be unbuffered.

An object exists completely or not at all. But nothing can be appended to it, it cannot
be moved, and directories are only prefixes of names.
"""

import contextlib
import errno
import fcntl
import functools
import importlib.util
import itertools
import json
import logging
import math
import os
import pathlib
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from etils import epath

from resnet_jax import paths
from resnet_jax.console import output
from resnet_jax.console.output import reason_of
from resnet_jax.errors import UserError, problem_of, problem_of_store
from resnet_jax.persistence import user_cache

log = logging.getLogger(__name__)

Path: TypeAlias = pathlib.Path | epath.Path

# The packages with which fsspec, which epath calls, reads and writes objects.
CLIENTS = {"gs": "gcsfs", "s3": "s3fs"}
# How long an object store may take to answer, in seconds. gcsfs takes 35 seconds to
# report that credentials are not valid.
ANSWER_TIMEOUT = 60.0
# Objects below this many bytes are always fetched again: they may be tables of contents
# or lists of classes, which describe the other objects.
SMALL = 2**17

# This must be set before epath is used. Where TensorFlow is installed, epath would
# import it, which is not to be in a training process and cannot read s3://.
os.environ.setdefault("EPATH_USE_TF", "false")


def path_of(location: str | os.PathLike) -> Path:
    """Returns the path object for a location that a user wrote.

    Args:
      location: A local path, or an address such as `gs://bucket/runs/1`.

    Raises:
      UserError: The location is in an object store that is not supported, or whose
        client is not installed; or it is a path that no file can have, see
        `paths.local`.
    """
    text = os.fspath(location)
    scheme, separator, rest = text.partition("://")
    if not separator or "/" in scheme:
        _check_slashes(text)
        return paths.local(text)
    if scheme not in CLIENTS:
        known = " and ".join(f"{name}://" for name in CLIENTS)
        raise UserError(
            f"{text} cannot be reached: only {known} and local paths are supported."
        )
    if not rest.strip("/"):
        raise UserError(f"{text} has no bucket: write {scheme}://BUCKET/FOLDER.")
    if importlib.util.find_spec(CLIENTS[scheme]) is None:
        raise UserError(
            f"{text} needs the package {CLIENTS[scheme]}, which is not installed:"
            f" pip install {CLIENTS[scheme]}"
        )
    _configure_clients()
    return epath.Path(text)


def _check_slashes(text: str) -> None:
    """Raises UserError for an address without two slashes, which `pathlib` removes."""
    scheme, colon, rest = text.partition(":")
    if colon and scheme in CLIENTS:
        raise UserError(
            f"{text} is neither a local path nor in an object store: write"
            f" {scheme}://{rest.lstrip('/')}, or ./{text} for a local path."
        )


def file_to_write(location: str) -> Path:
    """Returns the path object for a file that is to be written, after a check.

    It is for command lines: a mistake is reported before the work whose result the
    file is to hold.

    Args:
      location: The location as the user wrote it; see `path_of`.

    Raises:
      UserError: See `path_of` and `paths.file_to_write`.
    """
    if "://" not in location:
        _check_slashes(location)
        return paths.file_to_write(location)
    path = path_of(location)
    with explaining_errors(path):
        return path


def is_remote(path: Path) -> bool:
    """Returns whether a path is in an object store."""
    return "://" in os.fspath(path)


def absolute(path: Path) -> Path:
    """Returns the absolute form of a path."""
    # epath's own method would put the working directory before a bucket.
    return path if is_remote(path) else path.absolute()


def local_path_of(location: str | os.PathLike, what: str) -> pathlib.Path:
    """Returns the path object for a location that must be on a file system.

    Args:
      location: The location as the user wrote it.
      what: The subject of the error message, such as `The data set`.

    Raises:
      UserError: The location is in an object store.
    """
    text = os.fspath(location)
    if "://" in text:
        raise UserError(
            f"{what} must be on a file system, not at {location}: give a local path,"
            " and copy the files to or from the object store (gcloud storage cp -r,"
            " aws s3 cp --recursive)."
        )
    _check_slashes(text)
    return paths.local(text)


def _configure_clients() -> None:
    import fsspec.config

    for protocol in ("gcs", "s3"):
        options = fsspec.config.conf.setdefault(protocol, {})
        # With a cache, a process would never see what another one writes.
        options.setdefault("use_listings_cache", False)
    # gcsfs raises the errors that it logs, which would print tracebacks.
    if not (logger := logging.getLogger("gcsfs")).level:
        logger.setLevel(logging.CRITICAL)


@contextlib.contextmanager
def explaining_errors(path: Path, timeout: float = ANSWER_TIMEOUT) -> Iterator[None]:
    """Turns errors of a file system, an object store or its client into a UserError.

    Args:
      path: The path that is read or written inside the context. If it is local, an
        error that there is no such file is left as it is.
      timeout: The time that the store may take for its first answer, in seconds.

    Raises:
      UserError: The file system or the store refuses, the store does not answer, or
        the bucket does not exist.
    """
    if not is_remote(path):
        try:
            yield
        except OSError as error:
            if problem := problem_of(error, os.fspath(path)):
                raise UserError(problem) from error
            raise
        return
    try:
        _probe(path, timeout)
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError):
            bucket = "/".join(os.fspath(path).split("/")[:3])
            raise UserError(
                f"There is no {path}, or not even a bucket {bucket}; create it, or"
                " correct the name."
            ) from error
        if problem := problem_of_store(error):
            raise UserError(f"{path} cannot be used: {problem}.") from error
        raise


def _probe(path: Path, timeout: float) -> None:
    """Raises what a client raises for a path, or UserError if it does not answer."""
    problems = []

    def ask():
        try:
            path.exists()
        except Exception as error:
            problems.append(error)

    # Clients retry for up to half an hour, so a thread asks.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    with output.telling(f"Waiting up to {timeout:g} s for {path} to answer."):
        asking.join(timeout)
    if asking.is_alive():
        raise UserError(
            f"{path} cannot be used: the store did not answer within {timeout:g} s;"
            " check the network of this host, and the endpoint if one is set."
        )
    for problem in problems:
        raise problem


def read(path: Path) -> bytes:
    """Returns the content of a file; that of an object is from one point in time.

    An `epath.Path` asks for the size of an object first, and fails if the object was
    replaced since.
    """
    if not is_remote(path):
        return path.read_bytes()
    import fsspec

    files, name = fsspec.core.url_to_fs(os.fspath(path))
    return files.cat_file(name)


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
      path: The file. The figures in it may be null, `NaN` or `Infinity`, which older
        versions wrote.

    Raises:
      FileNotFoundError: There is nothing at the path.
      UserError: It cannot be read, or is not such a file; the message says why.
    """
    try:
        content = read(path) if is_remote(path) or path.is_file() else None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}.") from None
    if content is None:
        if not os.path.lexists(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        # Reading a named pipe in place of the file would wait for ever.
        raise UserError(f"{path} is not a file.")
    if not content.strip(b"\0 \r\n"):
        raise UserError(f"{path} is empty.")
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({reason_of(error)}).") from None
    if not isinstance(parsed, dict):
        raise UserError(f"{path} holds no JSON object.")
    return parsed


def to_json(content: Any, **options: Any) -> str:
    """Returns a text that every reader of JSON accepts.

    Numbers that are not finite become null, since JSON has no names for them.

    Args:
      content: A tree of dictionaries, lists, tuples, texts, numbers, booleans and None.
      options: Arguments of `json.dumps`, such as `indent`.
    """
    return json.dumps(_with_finite_numbers(content), allow_nan=False, **options)


def _with_finite_numbers(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _with_finite_numbers(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_finite_numbers(value) for value in content]
    return content


def write(path: Path, content: str | bytes) -> None:
    """Writes a file so that it exists completely or not at all.

    A local file is on the disk when this returns, and a failure leaves what was at the
    path before.
    """
    content = _encoded(content)
    # A pipe or a device must not be replaced by a file.
    if is_remote(path) or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    # The token keeps two programs that write the same file apart. The name is short,
    # since a file system limits names to 255 bytes.
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        partial.write_bytes(content)
        commit(partial, path)
    finally:
        # The disk may be full, and other files may need the space.
        with contextlib.suppress(OSError):
            partial.unlink()


def commit(partial: pathlib.Path, path: pathlib.Path) -> None:
    """Gives a complete file its name, such that a power cut cannot damage it.

    The content is on the disk before the file has the name, and the name when this
    returns.

    Args:
      partial: The file under a temporary name in the same directory.
      path: Its name from now on; a file of this name is replaced.
    """
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


# Errors of file systems that cannot flush a file or a directory, and of a directory
# whose names may be changed but not listed.
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)


def sync(path: pathlib.Path) -> None:
    """Waits until a local file, or the names in a local directory, are on disk.

    It does nothing where the file system cannot do this.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def sync_tree(path: pathlib.Path) -> None:
    """Waits until a local directory is on disk with all that it holds."""
    for folder, _, names in os.walk(path, topdown=False):
        for name in names:
            sync(pathlib.Path(folder, name))
        sync(pathlib.Path(folder))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as `write` does; numbers that are not finite become null."""
    write(path, to_json(content, indent=2) + "\n")


def write_by_product(path: Path, content: bytes | Mapping[str, Any]) -> None:
    """Writes a file of a run that can be made again, over what is left of an older one.

    Anything that is not a file of this kind is set aside first: a directory, a named
    pipe, or a JSON file that holds no object. A warning says so.

    Args:
      path: The file.
      content: Its content; a mapping is written as JSON.
    """
    if isinstance(content, Mapping):
        try:
            read_object(path)
        except FileNotFoundError:
            pass
        except UserError as damage:
            set_aside(path, str(damage))
        write_json(path, content)
    else:
        make_way(path)
        write(path, content)


def make_way(
    path: Path, kind: Callable[[pathlib.Path], bool] = pathlib.Path.is_file
) -> None:
    """Sets aside what is at a local path, unless it is of the right kind.

    Args:
      path: The path, at which there may be nothing.
      kind: Tells whether a path is of the right kind.
    """
    if not is_remote(path) and os.path.lexists(path) and not kind(path):
        set_aside(path, f"{path} is in the way.")


def set_aside(path: Path, reason: str) -> Path:
    """Renames a damaged file or directory, with a warning; nothing of it is lost.

    Args:
      path: The path, such as `metrics.jsonl`.
      reason: A sentence that says what is wrong with it.

    Returns:
      The first free path of `metrics.jsonl.damaged-1`, `metrics.jsonl.damaged-2`, ...
    """
    for number in itertools.count(1):
        target = path.with_name(f"{path.name}.damaged-{number}")
        taken = target.exists() if is_remote(path) else os.path.lexists(target)
        if not taken:
            break
    if is_remote(path):
        epath.Path(path).copy(target)
        path.unlink()
    else:
        os.rename(path, target)
        sync(path.parent)
    output.warn(f"{reason} It was renamed to {target.name}, and is made again.")
    return target


def make_directory(path: Path) -> None:
    """Creates a local directory and its parents unless they exist.

    Nothing is done in an object store, where there are no directories.
    """
    # A client would create a missing bucket.
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def files_of(path: Path) -> Iterator[Path]:
    """Yields all files below a directory, in no particular order."""
    for child in path.iterdir():
        if child.is_dir():
            yield from files_of(child)
        else:
            yield child


def move_tree(path: Path, target: Path) -> None:
    """Moves a directory; the parent of the target is created if it is missing."""
    if is_remote(path):
        with ThreadPoolExecutor(16) as pool:
            names = [file.relative_to(path) for file in files_of(path)]
            list(pool.map(lambda name: (path / name).copy(target / name), names))
        epath.Path(path).rmtree()
        return
    target.parent.mkdir(exist_ok=True)
    shutil.move(path, target)


class GrowingFile:
    """A file to which text or bytes are appended.

    In an object store the whole content is written again, at most every `interval`
    seconds and in `flush`. Call `flush` before anything that relies on the content,
    since the process may be killed.

    Args:
      path: The file; what it held before is replaced.
      content: The first content of the file.
      interval: The shortest time between two writes of an object, in seconds. GCS
        allows one write per second.
    """

    def __init__(self, path: Path, content: str | bytes = b"", interval: float = 5.0):
        self._path, self._content = path, _encoded(content)
        self._interval = interval
        self._written = time.monotonic()
        write(path, content)
        # Unbuffered, so that no data are left to be written after an error.
        self._file = None if is_remote(path) else path.open("ab", buffering=0)

    def add(self, content: str | bytes) -> None:
        """Appends text or bytes; a text must end in a line break."""
        if self._file:
            rest = memoryview(_encoded(content))
            while rest:
                rest = rest[self._file.write(rest) :]
            return
        self._content += _encoded(content)
        if time.monotonic() - self._written > self._interval:
            self.flush()

    def flush(self) -> None:
        """Returns when everything is written, for a local file to the disk."""
        if self._file:
            os.fsync(self._file.fileno())
            return
        write(self._path, self._content)
        self._written = time.monotonic()

    def close(self) -> None:
        """Writes what is left, and closes the file."""
        self.flush()
        if self._file:
            self._file.close()


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


@contextlib.contextmanager
def local_files(*paths: Path) -> Iterator[list[pathlib.Path]]:
    """Provides files on a file system for libraries that read no object stores.

    Objects are copied to a temporary directory under their own names, for as long as
    the context is open. A file that is missing in the store is missing there too.

    Yields:
      The local paths, in the order of `paths`.
    """
    if not any(map(is_remote, paths)):
        yield [pathlib.Path(path) for path in paths]
        return
    with tempfile.TemporaryDirectory() as directory:
        copies = [pathlib.Path(directory, path.name) for path in paths]
        for path, copy in zip(paths, copies, strict=True):
            with contextlib.suppress(FileNotFoundError):
                _download(path, copy)
        yield copies


@contextlib.contextmanager
def local_folder(path: Path) -> Iterator[pathlib.Path]:
    """Provides a local folder for libraries that write to no object stores.

    For a folder in an object store it is a temporary one, whose files are uploaded when
    the context ends.

    Yields:
      The local folder.
    """
    if not is_remote(path):
        yield pathlib.Path(path)
        return
    with tempfile.TemporaryDirectory() as directory:
        yield pathlib.Path(directory)
        for file in pathlib.Path(directory).iterdir():
            with (
                explaining_errors(path),
                file.open("rb") as source,
                (path / file.name).open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 2**20)


@functools.cache
def kept_copy(folder: Path, small: int = SMALL) -> pathlib.Path:
    """Copies a folder of an object store to the user's cache directory.

    The copy is made once per host, while other processes of the host wait. Later calls
    only fetch objects that are small, since those may describe others, or whose size
    differs from that of the copy, and remove files whose object is gone.

    Args:
      folder: The folder in the object store. A local folder is returned as it is.
      small: The size below which objects are always fetched again, in bytes.

    Returns:
      The local folder.

    Raises:
      UserError: There is no such folder, the disk has too little space, or the store
        refuses.
    """
    if not is_remote(folder):
        return pathlib.Path(folder)
    scheme, _, place = os.fspath(folder).partition("://")
    try:
        target = user_cache.directory() / "data" / scheme / place
        user_cache.claim(user_cache.directory() / "data")
        target.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        raise UserError(
            f"{folder} cannot be copied to this host: {error}. Set XDG_CACHE_HOME to"
            " use another directory."
        ) from None
    with (
        explaining_errors(folder),
        (target / ".lock").open("w") as lock,
        ThreadPoolExecutor(16) as pool,
    ):
        # The processes are of one host, so flock suffices, and it needs no package.
        with output.telling(f"Waiting for another process that copies {folder}."):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}.")
        files = list(files_of(folder))
        sizes = list(pool.map(lambda file: file.stat().length, files))
        copies = [target / file.relative_to(folder) for file in files]
        missing = [
            (size, file, copy)
            for size, file, copy in zip(sizes, files, copies, strict=True)
            if size < small or not copy.exists() or copy.stat().st_size != size
        ]
        total = sum(size for size, *_ in missing)
        if total > (free := shutil.disk_usage(target).free):
            raise UserError(
                f"{folder} needs {total / 1e9:.1f} GB more on this host, but {target}"
                f" has {free / 1e9:.1f} GB. Free some space, or set XDG_CACHE_HOME to"
                " use another directory."
            )
        if total > SMALL * len(missing):
            log.warning("Copying %.1f GB of %s to %s.", total / 1e9, folder, target)
        for directory in {copy.parent for copy in copies}:
            directory.mkdir(parents=True, exist_ok=True)
        list(pool.map(lambda item: _fetch(*item[1:]), missing))
        _remove_others(target, set(copies))
    return target


def _remove_others(folder: pathlib.Path, kept: set[pathlib.Path]) -> None:
    """Removes the files of a copied folder that are not to be kept, and empty folders.

    A folder inside may be the copy of another call, whose lock and unfinished files
    stay.
    """
    for place, _, names in os.walk(folder, topdown=False):
        for file in (pathlib.Path(place, name) for name in names):
            if file not in kept and not file.name.startswith((".lock", ".partial-")):
                file.unlink()
        # Folders with files in them cannot be removed.
        with contextlib.suppress(OSError):
            os.rmdir(place)


def _fetch(path: Path, target: pathlib.Path) -> None:
    """Copies an object to a file so that the file exists completely or not at all."""
    partial = target.with_name(f".partial-{target.name}")
    _download(path, partial)
    commit(partial, target)


def _download(path: Path, target: pathlib.Path) -> None:
    with path.open("rb") as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 2**24)
