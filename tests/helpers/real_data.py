"""Finds the real data that some tests need."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def real_data(name: str) -> Path:
    """Returns a file or directory of the shared data, or skips the test.

    The directory of the data is `$RESNET_JAX_DATA` or, if that is not set,
    `../shared/data` beside the repository.
    """
    directory = Path(
        os.environ.get("RESNET_JAX_DATA") or ROOT.parent / "shared" / "data"
    )
    path = directory / name
    if not path.exists():
        pytest.skip(f"{path} is missing; set RESNET_JAX_DATA to the real data's folder")
    return path
