"""Where compiled programs are kept from one start to the next."""

import hashlib
import logging
import pathlib
import platform

import jax

from resnet_jax.errors import UserError
from resnet_jax.persistence import user_cache

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
    try:
        path = directory()
        user_cache.claim(path)
    except UserError as error:
        log.warning(
            "Compiled programs are not kept (%s). JAX_COMPILATION_CACHE_DIR can say"
            " another directory of your own.",
            error,
        )
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    return path


def directory() -> pathlib.Path:
    """The directory for programs of this processor, which need not run on others.

    Raises UserError; see `user_cache.directory`.
    """
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    abilities = next((x for x in lines if x.startswith(("flags", "Features"))), "")
    kind = f"{platform.machine()} {platform.processor()} {abilities}"
    name = hashlib.sha256(kind.encode()).hexdigest()[:8]
    return user_cache.directory() / "compiled" / name
