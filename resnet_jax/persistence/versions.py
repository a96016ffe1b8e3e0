"""Versions of the code behind a result: this package's source code, and its packages.

They are recorded with checkpoints and results, and compared when a run resumes.
"""

import hashlib
import importlib.metadata
import pathlib
import platform
from collections.abc import Callable

PACKAGE = pathlib.Path(__file__).parents[1]


def code_checksum(
    is_excluded: Callable[[str], bool] = lambda name: False,
    package: pathlib.Path | None = None,
) -> str:
    """Returns a checksum of the package's source code, wherever it is installed.

    The recipes in `configs/`, which only an installed package contains, are left out:
    they are compared as configs.

    Args:
      is_excluded: Returns whether to leave out a file, given its name, such as
        `resnet_jax/training/step.py`.
      package: The directory of the package; by default the one that is imported.

    Returns:
      The SHA-256 of names and contents of the files, in hexadecimal.
    """
    package = package or PACKAGE
    checksum = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        if package / "configs" in path.parents:
            continue
        name = path.relative_to(package.parent).as_posix()
        if not is_excluded(name):
            checksum.update(name.encode() + b"\0" + path.read_bytes())
    return checksum.hexdigest()


def package_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    names = (
        *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
        "pillow",
    )
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **versions}
