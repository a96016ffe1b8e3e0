"""Where the tests that need real data find it."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def real_data(name: str) -> Path:
    """Returns a file or directory of the shared data, or skips the test.

    The data lie in `$RESNET_JAX_DATA`, or else in `../shared/data` beside the
    repository.
    """
    directory = Path(
        os.environ.get("RESNET_JAX_DATA") or ROOT.parent / "shared" / "data"
    )
    path = directory / name
    if not path.exists():
        pytest.skip(f"no {path}: set RESNET_JAX_DATA to the directory of real data")
    return path
