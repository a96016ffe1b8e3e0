"""Where compiled programs are kept from one start to the next."""

import hashlib
import logging
import os
import pathlib
import platform
import stat

import jax

log = logging.getLogger(__name__)


def turn_on() -> pathlib.Path | None:
    """Lets JAX keep its programs in the user's cache directory; returns where.

    JAX_COMPILATION_CACHE_DIR, if it is set, says another place, and
    JAX_ENABLE_COMPILATION_CACHE=false turns it off. What is kept is run as it is found,
    so a directory that others may write to is not used.
    """
    given = jax.config.jax_compilation_cache_dir
    if given or not jax.config.jax_enable_compilation_cache:
        return pathlib.Path(given) if given else None
    path = directory()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.stat()
    except OSError as error:
        log.warning("Compiled programs are not kept: %s: %s.", path, error.strerror)
        return None
    foreign = status.st_uid != os.getuid()
    if foreign or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        log.warning(
            "Compiled programs are not kept: others may write to %s; chmod 700 it, or"
            " set JAX_COMPILATION_CACHE_DIR to a directory of your own.",
            path,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    return path


def directory() -> pathlib.Path:
    """The directory for programs of this processor, which need not run on others."""
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    abilities = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    kind = f"{platform.machine()} {platform.processor()} {abilities}"
    name = hashlib.sha256(kind.encode()).hexdigest()[:8]
    return pathlib.Path(home) / "resnet_jax" / "compiled" / name
