"""What tests of `plan` share."""

import pytest


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache directory of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "resnet_jax" / "plan"
