"""What may be lost but saves time: the user's cache directory."""

import os
import pathlib
import stat

from resnet_jax.errors import UserError


def directory() -> pathlib.Path:
    """Where this program keeps such things."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(home) / "resnet_jax"


def claim(path: pathlib.Path) -> None:
    """Makes a directory for the user alone; what is kept there is trusted.

    Raises UserError, a clause without a stop, if it cannot be, or others may write to
    it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    foreign = status.st_uid != os.getuid()
    if foreign or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(f"others may write to {path}; chmod 700 it")
