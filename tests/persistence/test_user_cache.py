"""The user's cache directory is the user's own."""

import os

import pytest

from resnet_jax.errors import UserError
from resnet_jax.persistence import user_cache


def test_a_directory_is_made_for_the_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = user_cache.directory() / "some"
    user_cache.claim(path)
    assert tmp_path in path.parents
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("given", ["", "relative/cache"])
def test_without_an_absolute_place_it_is_in_the_home(given, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache.directory() == tmp_path / ".cache" / "resnet_jax"


def test_directories_on_the_way_are_the_users_own_as_well(tmp_path, monkeypatch):
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


def test_what_is_another_users_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(UserError, match="belongs to another user"):
        user_cache.claim(tmp_path)


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_write_to_is_refused(mode, tmp_path):
    tmp_path.chmod(mode)
    with pytest.raises(UserError, match=r"others may write to .*; chmod 700 it"):
        user_cache.claim(tmp_path)


def test_what_the_system_refuses_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/some: Not a directory"):
        user_cache.claim(tmp_path / "file" / "some")
