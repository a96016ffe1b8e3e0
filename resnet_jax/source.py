"""What programs are made of besides the config."""

import hashlib
import pathlib
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[1]
# The package, and what it reads of the configs by itself.
PLACES = ("resnet_jax", "configs/compiler")


def digest(aside: Callable[[str], bool] = lambda name: False) -> str:
    """A checksum of the source, in its place or edited.

    Args:
      aside: whether a file, such as `resnet_jax/step.py`, does not count.
    """
    found = hashlib.sha256()
    files = [file for place in PLACES for file in (ROOT / place).rglob("*.py")]
    for path in sorted(files):
        name = path.relative_to(ROOT).as_posix()
        if not aside(name):
            found.update(name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
