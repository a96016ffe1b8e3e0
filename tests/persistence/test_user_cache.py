"""The cache directory can be written by the user alone."""

import os

import pytest

from resnet_jax.errors import UserError
from resnet_jax.persistence import user_cache


def test_a_new_directory_is_accessible_to_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = user_cache.directory() / "some"
    user_cache.claim(path)
    assert tmp_path in path.parents
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("given", ["", "relative/cache"])
def test_without_an_absolute_path_the_cache_is_in_the_home_directory(
    given, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache.directory() == tmp_path / ".cache" / "resnet_jax"


def test_a_relative_home_directory_is_none(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "relative")
    with pytest.raises(UserError, match="no home directory; set XDG_CACHE_HOME"):
        user_cache.directory()


def test_directories_above_must_be_the_users_own_as_well(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = user_cache.directory()
    before = os.umask(0)
    try:
        user_cache.claim(root / "some" / "where")
    finally:
        os.umask(before)
    for path in (root, root / "some", root / "some" / "where"):
        assert path.stat().st_mode & 0o777 == 0o700
    (root / "some").chmod(0o777)
    with pytest.raises(UserError, match=r"others may write to .*/some; chmod 700 it"):
        user_cache.claim(root / "some" / "where")


def test_a_directory_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        user_cache.claim(tmp_path)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_to_which_others_can_write_is_refused(mode, tmp_path):
    tmp_path.chmod(mode)
    with pytest.raises(UserError, match=r"others may write to .*; chmod 700 it"):
        user_cache.claim(tmp_path)


def test_an_error_of_the_system_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/some: Not a directory"):
        user_cache.claim(tmp_path / "file" / "some")
