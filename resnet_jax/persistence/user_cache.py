"""The user's cache directory, for files that save time and may be lost."""

import os
import pathlib
import stat

from resnet_jax.errors import UserError


def directory() -> pathlib.Path:
    """Returns this package's folder in the user's cache directory.

    Raises:
      UserError: The user has no home directory. The message is a clause without a full
        stop, for use in a longer sentence.
    """
    # The XDG Base Directory Specification says that relative paths are ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise UserError("there is no home directory; set XDG_CACHE_HOME")
    return pathlib.Path(base, "resnet_jax")


def claim(path: pathlib.Path) -> None:
    """Creates a directory to which only the user can write.

    The content of the directory is trusted: compiled programs in it are executed. The
    directories between it and `directory()` must be the user's own as well, since
    anybody who can write to one of them could replace the next one.

    Args:
      path: The directory, which may exist already.

    Raises:
      UserError: The directory cannot be created, belongs to another user, or others
        can write to it. The message is a clause without a full stop.
    """
    root = directory()
    parents = [parent for parent in path.parents if parent.is_relative_to(root)]
    for folder in (*reversed(parents), path):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}") from None
        if status.st_uid != os.getuid():
            raise UserError(f"{folder} belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UserError(f"others may write to {folder}; chmod 700 it")
