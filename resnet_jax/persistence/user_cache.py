"""What may be lost but saves time: the user's cache directory."""

import os
import pathlib
import stat

from resnet_jax.errors import UserError


def directory() -> pathlib.Path:
    """Where this program keeps such things.

    Raises UserError, a clause without a stop, if the user has no home.
    """
    base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # What is relative is to be ignored, says the XDG Base Directory Specification.
        base = base if base.is_absolute() else pathlib.Path.home() / ".cache"
    except RuntimeError:
        raise UserError("there is no home directory; set XDG_CACHE_HOME") from None
    return base / "resnet_jax"


def claim(path: pathlib.Path) -> None:
    """Makes a directory for the user alone; what is kept there is trusted.

    Those between it and `directory` are the user's own as well: whoever may write to
    one could put another in its place.

    Raises UserError, a clause without a stop, if it cannot be, or others may write to
    it.
    """
    root = directory()
    within = [one for one in path.parents if one.is_relative_to(root)]
    for one in (*reversed(within), path):
        try:
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = one.stat()
        except OSError as error:
            raise UserError(f"{one}: {error.strerror}") from None
        if status.st_uid != os.getuid():
            raise UserError(f"{one} belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise UserError(f"others may write to {one}; chmod 700 it")
