"""Local paths as users write them: on a command line, in a config or in Python.

They are checked where they are given, before any work whose result could be lost.
"""

import os
import pathlib
import re
import stat
import tempfile

from resnet_jax.errors import UserError, shortened


def local(location: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path object for a local path that a user wrote.

    `~` and `~USER` at its beginning become the home directory, unless a file has that
    name.

    Args:
      location: The path, at which nothing need exist.

    Raises:
      UserError: The path is empty, an address or a device, or the system cannot look it
        up: it is too long, has a null byte, leads through a file or in a circle, or is
        not accessible.
    """
    path, mode = _look_up(location)
    # Reading some of them, such as /dev/zero, never ends.
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise UserError(f"{shown(path)} is a device. Give a file or a directory.")
    return path


def _look_up(location: str | os.PathLike[str]) -> tuple[pathlib.Path, int]:
    """Returns the path object, and the mode of what exists there or 0."""
    text, mode = os.fspath(location), 0
    if not text.strip():
        raise UserError("A path is empty; is a variable unset? Give a path.")
    if re.match(r"[A-Za-z][\w+.-]*://", text):
        raise UserError(f"{shown(text)} is an address; give a local path here.")
    try:
        if text.startswith("~") and not os.path.lexists(text):
            text = _expanded(text)
        mode = os.stat(text).st_mode
    except FileNotFoundError:
        pass
    # A null byte raises ValueError.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"The path {shown(text)} cannot be used: {reason}. Correct it, or give"
            " another one."
        ) from None
    return pathlib.Path(text), mode


def _expanded(text: str) -> str:
    home = text.partition("/")[0]
    if not os.path.isabs(os.path.expanduser(home)):
        raise UserError(
            f"{shown(text)}: the home directory {shown(home)} is not known. Write the"
            f" whole path, or ./{shown(text)} for a file of that name."
        )
    return os.path.expanduser(text)


def shown(path: str | os.PathLike[str]) -> str:
    """Returns a path for a message: on one line, and shortened if it is long."""
    text = os.fspath(path)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return shortened(text)


def file_to_write(location: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path object for a file that is to be written, after a check.

    Args:
      location: The path of the file, which need not exist. Its directory must exist.

    Raises:
      UserError: The location is a directory, or no file can be written there; and as
        for `local`, but devices may be written to.
    """
    path, mode = _look_up(location)
    if os.fspath(location).endswith("/") or stat.S_ISDIR(mode):
        raise UserError(
            f"{shown(location)} is a directory; add the name of the file to write in"
            " it."
        )
    # Pipes and devices may be where no file can be created.
    if not mode or stat.S_ISREG(mode):
        _check_writable(path.parent, path)
    return path


def check_folder_to_write(path: pathlib.Path) -> None:
    """Checks that a directory can be created, or written to if it exists.

    Args:
      path: The directory, as `local` returns it.

    Raises:
      UserError: The path or a part of it is not a directory, nothing can be written
        there, or the path is not UTF-8, which Orbax and tfds need.
    """
    if not _is_utf8(path):
        raise UserError(
            f"The name of the directory {shown(path)} is not UTF-8, which the libraries"
            " that write to it need. Choose another name."
        )
    existing = next(x for x in (path, *path.absolute().parents) if os.path.lexists(x))
    if not existing.is_dir():
        kind = "exists and is not one" if existing.exists() else "is a broken link"
        raise UserError(
            f"{shown(path)} cannot be a directory, since {shown(existing)} {kind}."
            " Choose another path."
        )
    _check_writable(existing, path)


def _is_utf8(path: pathlib.Path) -> bool:
    try:
        os.fspath(path.absolute()).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_writable(folder: pathlib.Path, path: pathlib.Path) -> None:
    """Raises UserError if no file can be created in the folder that is to hold a path.

    The permissions do not tell: root has them all, and a file system may be read-only.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror
        if not folder.exists():
            reason = f"there is no directory {shown(folder)}"
        raise UserError(
            f"{shown(path)} cannot be written: {reason}. Correct that, or choose"
            " another path."
        ) from None
