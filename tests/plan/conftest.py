"""Fixtures of the tests of `plan`."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Gives the user an empty cache directory; returns its folder of plans."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "resnet_jax" / "plan"
