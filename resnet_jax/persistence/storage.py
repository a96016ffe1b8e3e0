"""Files on file systems and in object stores, and what the latter cannot do.

A path of `gs://` or `s3://` is an `epath.Path`, every other one a `pathlib.Path`. An
object is there whole or not at all; but nothing can be appended to it, it cannot be
moved, only its whole content has a time, and folders are only what names begin with.
"""

import contextlib
import fcntl
import functools
import importlib.util
import logging
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from resnet_jax.errors import UserError, problem_of_store
from resnet_jax.persistence import user_cache

log = logging.getLogger(__name__)

Path = pathlib.Path | epath.Path

# The packages with which fsspec, which epath asks, reads and writes objects.
CLIENTS = {"gs": "gcsfs", "s3": "s3fs"}
# Seconds; gcsfs takes 35 to say that credentials are not valid.
ANSWERS_WITHIN = 60.0
# Bytes, of what is always fetched again: tables of contents, lists of classes.
SMALL = 2**17

# Before epath first looks: with TensorFlow installed, it would ask that, which is not
# to be in a training process and reads no s3://.
os.environ.setdefault("EPATH_USE_TF", "false")


def path_of(where: str | os.PathLike) -> Path:
    """The path that a user wrote.

    Raises UserError if it is in an object store whose client is not installed, or in
    one that is not known.
    """
    text = os.fspath(where)
    scheme, separator, rest = text.partition("://")
    if not separator or "/" in scheme:
        return pathlib.Path(where)
    if scheme not in CLIENTS:
        known = " and ".join(f"{name}://" for name in CLIENTS)
        raise UserError(f"{text} cannot be reached: {known} are, and local paths.")
    if not rest.strip("/"):
        raise UserError(f"{text} has no bucket: write {scheme}://BUCKET/FOLDER.")
    if importlib.util.find_spec(CLIENTS[scheme]) is None:
        raise UserError(
            f"{text} needs the package {CLIENTS[scheme]}, which is not installed:"
            f" pip install {CLIENTS[scheme]}"
        )
    _configure_clients()
    return epath.Path(text)


def is_remote(path: Path) -> bool:
    """Whether a path is in an object store."""
    return "://" in os.fspath(path)


def absolute(path: Path) -> Path:
    """The path from the root on."""
    # epath's own would put the working directory before a bucket.
    return path if is_remote(path) else path.absolute()


def local_path_of(where: str | os.PathLike, what: str) -> pathlib.Path:
    """As `path_of`; raises UserError if it is in an object store.

    Args:
      where: as the user wrote it.
      what: cannot be there.
    """
    if "://" in os.fspath(where):
        raise UserError(
            f"{what} must be on a file system, not at {where}: give a local path, and"
            " copy it there or from there (gcloud storage cp -r, aws s3 cp"
            " --recursive)."
        )
    return pathlib.Path(where)


def _configure_clients() -> None:
    import fsspec.config

    for protocol in ("gcs", "s3"):
        options = fsspec.config.conf.setdefault(protocol, {})
        # Else a process never sees what another one writes.
        options.setdefault("use_listings_cache", False)


@contextlib.contextmanager
def telling(path: Path) -> Iterator[None]:
    """Tells what an object store or its client refuses as a UserError.

    Args:
      path: what is read or written inside; a local one changes nothing.
    """
    if not is_remote(path):
        yield
        return
    try:
        _ask(path)
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, FileNotFoundError):
            bucket = "/".join(os.fspath(path).split("/")[:3])
            raise UserError(
                f"There is no {path}, or not even a bucket {bucket}; make that, or mend"
                " the name."
            ) from error
        if why := problem_of_store(error):
            raise UserError(f"{path} cannot be used: {why}.") from error
        raise


def _ask(path: Path) -> None:
    """Raises what a client says of a path, or UserError if it says nothing in time."""
    problems = []

    def ask():
        try:
            path.exists()
        except Exception as error:
            problems.append(error)

    # Clients try again for half an hour.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWERS_WITHIN)
    if asking.is_alive():
        raise UserError(
            f"{path} cannot be used: the store did not answer within"
            f" {ANSWERS_WITHIN:g} s; check the network of this host, and the endpoint"
            " if one is set."
        )
    for problem in problems:
        raise problem


def read(path: Path) -> bytes:
    """What a file holds; of an object, what it held at one time.

    A file of epath asks for the size first, and fails if another content came since.
    """
    if not is_remote(path):
        return path.read_bytes()
    import fsspec

    files, name = fsspec.core.url_to_fs(os.fspath(path))
    return files.cat_file(name)


def write(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    content = _encoded(content)
    if is_remote(path):
        path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError:
        # Its room may be what others need.
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def make_directory(path: Path) -> None:
    """Makes a directory where there are any; it may be there already."""
    # A client would make a missing bucket.
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def files_of(path: Path) -> Iterator[Path]:
    """All files below a directory, in no order."""
    for child in path.iterdir():
        if child.is_dir():
            yield from files_of(child)
        else:
            yield child


def remove_tree(path: Path) -> None:
    """Removes a directory with all that is in it."""
    if is_remote(path):
        path.rmtree()
    else:
        shutil.rmtree(path)


def move_tree(path: Path, target: Path) -> None:
    """Moves a directory; its parent is made if there is none."""
    if is_remote(path):
        with ThreadPoolExecutor(16) as pool:
            names = [file.relative_to(path) for file in files_of(path)]
            list(pool.map(lambda name: (path / name).copy(target / name), names))
        path.rmtree()
        return
    target.parent.mkdir(exist_ok=True)
    shutil.move(path, target)


class GrowingFile:
    """A file that text or bytes are added to.

    In an object store the whole is written again, at most every `every` seconds, and
    with `flush`: what must outlast the process is written before that is called.

    Args:
      path: The file.
      content: What it begins with, instead of what it may hold.
      every: The seconds between two writings of an object; GCS takes one a second.
    """

    def __init__(self, path: Path, content: str | bytes = b"", every: float = 5.0):
        self._path, self._content, self._every = path, _encoded(content), every
        self._written = time.monotonic()
        write(path, content)
        # Unbuffered, so that nothing is left to be written after an error.
        self._file = None if is_remote(path) else path.open("ab", buffering=0)

    def add(self, content: str | bytes) -> None:
        """Adds text or bytes at the end; a text ends in a line break."""
        if self._file:
            rest = memoryview(_encoded(content))
            while rest:
                rest = rest[self._file.write(rest) :]
            return
        self._content += _encoded(content)
        if time.monotonic() - self._written > self._every:
            self.flush()

    def flush(self) -> None:
        """Returns when everything is written."""
        if not self._file:
            write(self._path, self._content)
            self._written = time.monotonic()

    def close(self) -> None:
        """Writes what is left."""
        self.flush()
        if self._file:
            self._file.close()


def _encoded(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


@contextlib.contextmanager
def local_files(*paths: Path) -> Iterator[list[pathlib.Path]]:
    """Files under their own names on a file system, for libraries that take no other.

    Those of an object store are copied, for as long as the context is open; what is
    missing there is missing here.
    """
    if not any(map(is_remote, paths)):
        yield list(paths)
        return
    with tempfile.TemporaryDirectory() as directory:
        copies = [pathlib.Path(directory, path.name) for path in paths]
        for path, copy in zip(paths, copies, strict=True):
            with contextlib.suppress(FileNotFoundError):
                _download(path, copy)
        yield copies


@contextlib.contextmanager
def local_folder(path: Path) -> Iterator[pathlib.Path]:
    """A folder on a file system, for libraries that write to no other.

    Of an object store, it is a new one, whose files are sent there in the end.
    """
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as directory:
        yield pathlib.Path(directory)
        for file in pathlib.Path(directory).iterdir():
            with (
                telling(path),
                file.open("rb") as source,
                (path / file.name).open("wb") as target,
            ):
                shutil.copyfileobj(source, target, 2**20)


@functools.cache
def kept_copy(folder: Path) -> pathlib.Path:
    """A copy of a folder of an object store, kept in the user's cache directory.

    Made once on a host, whose other processes wait; later, what has another size there
    is fetched again, and what is small, since it tells of the rest. A local folder is
    its own copy.

    Raises UserError if there is no such folder, no room, or the store refuses.
    """
    if not is_remote(folder):
        return folder
    scheme, _, place = os.fspath(folder).partition("://")
    try:
        target = user_cache.directory() / "data" / scheme / place
        user_cache.claim(user_cache.directory() / "data")
        target.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        raise UserError(
            f"{folder} cannot be copied to this host: {error}; XDG_CACHE_HOME says"
            " where else."
        ) from None
    with (
        telling(folder),
        (target / ".lock").open("w") as lock,
        ThreadPoolExecutor(16) as pool,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder}.")
        files = list(files_of(folder))
        sizes = list(pool.map(lambda file: file.stat().length, files))
        copies = [target / file.relative_to(folder) for file in files]
        missing = [
            (size, file, copy)
            for size, file, copy in zip(sizes, files, copies, strict=True)
            if size < SMALL or not copy.exists() or copy.stat().st_size != size
        ]
        total = sum(size for size, *_ in missing)
        if total > (free := shutil.disk_usage(target).free):
            raise UserError(
                f"{folder} takes {total / 1e9:.1f} GB more on this host, and {target}"
                f" has {free / 1e9:.1f} GB; XDG_CACHE_HOME says where else."
            )
        if total > SMALL * len(missing):
            log.warning("Copying %.1f GB of %s to %s.", total / 1e9, folder, target)
        for copy in {copy.parent for copy in copies}:
            copy.mkdir(parents=True, exist_ok=True)
        list(pool.map(lambda found: _fetch(*found[1:]), missing))
    return target


def _fetch(path: Path, target: pathlib.Path) -> None:
    """Copies a file so that it is there whole or not at all."""
    partial = target.with_name(f".partial-{target.name}")
    _download(path, partial)
    os.replace(partial, target)


def _download(path: Path, target: pathlib.Path) -> None:
    with path.open("rb") as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 2**24)
