"""The user's cache directory is the user's own."""

import pytest

from resnet_jax import user_cache
from resnet_jax.errors import UserError


def test_a_directory_is_made_for_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = user_cache.directory() / "some"
    user_cache.claim(path)
    assert tmp_path in path.parents
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_write_to_is_refused(mode, tmp_path):
    tmp_path.chmod(mode)
    with pytest.raises(UserError, match=r"others may write to .*; chmod 700 it"):
        user_cache.claim(tmp_path)


def test_what_the_system_refuses_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/some: Not a directory"):
        user_cache.claim(tmp_path / "file" / "some")
