"""JAX's compilation cache in the user's cache directory."""

import hashlib
import logging
import pathlib
import platform

import jax

from resnet_jax import paths
from resnet_jax.errors import UserError
from resnet_jax.persistence import user_cache

log = logging.getLogger(__name__)


def turn_on() -> pathlib.Path | None:
    """Lets JAX keep compiled programs from one start to the next.

    JAX_COMPILATION_CACHE_DIR sets another directory, and
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off. Programs in the cache are
    executed unchecked, so a directory to which others can write is not used.

    Returns:
      The directory of the cache, or None if there is none.
    """
    user_directory = jax.config.values["jax_compilation_cache_dir"]
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    if user_directory and "://" in user_directory:
        return pathlib.Path(user_directory)
    try:
        if user_directory:
            path = paths.local(user_directory)
        else:
            path = directory()
            user_cache.claim(path)
    except UserError as error:
        log.warning(
            "Compiled programs are not kept (%s). Set JAX_COMPILATION_CACHE_DIR to use"
            " another directory that only you can write to.",
            str(error).rstrip("."),
        )
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    return path


def directory() -> pathlib.Path:
    """Returns the directory for programs compiled for this machine's processor.

    Programs for one kind of processor need not run on another kind.

    Raises:
      UserError: The user has no home directory, see `user_cache.directory`.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    kind = f"{platform.machine()} {platform.processor()} {features}"
    name = hashlib.sha256(kind.encode()).hexdigest()[:8]
    return user_cache.directory() / "compiled" / name
