"""The cache of compiled programs: on by default, and writable by the user alone."""

import re

import jax
import pytest

from resnet_jax.persistence import compile_cache
from tests.helpers import runs


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    """An empty cache directory of the user, and JAX without a compilation cache."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_where_only_the_user_can_write(cache_home):
    path = compile_cache.turn_on()
    assert cache_home in path.parents
    assert path.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(path)


def test_a_directory_that_the_user_chose_is_kept(cache_home):
    jax.config.update("jax_compilation_cache_dir", str(cache_home / "mine"))
    assert compile_cache.turn_on() == cache_home / "mine"
    assert not compile_cache.directory().exists()


def test_the_directory_that_the_user_chose_may_be_in_the_home_directory(
    cache_home, monkeypatch
):
    monkeypatch.setenv("HOME", str(cache_home))
    jax.config.update("jax_compilation_cache_dir", "~/mine")
    assert compile_cache.turn_on() == cache_home / "mine"
    assert jax.config.jax_compilation_cache_dir == str(cache_home / "mine")


@pytest.mark.parametrize("name", ["n" * 300, "file/x", "loop"])
def test_a_directory_that_cannot_be_is_one_warning(name, cache_home, caplog):
    (cache_home / "file").touch()
    (cache_home / "loop").symlink_to("loop")
    jax.config.update("jax_compilation_cache_dir", str(cache_home / name))
    assert compile_cache.turn_on() is None
    assert jax.config.jax_compilation_cache_dir is None
    (record,) = caplog.records
    assert "are not kept (The path " in record.getMessage()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_to_which_others_can_write_is_not_used(mode, cache_home, caplog):
    compile_cache.directory().mkdir(parents=True)
    compile_cache.directory().chmod(mode)
    assert compile_cache.turn_on() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert "others may write to" in caplog.text


def test_a_directory_that_cannot_be_created_is_a_warning(
    cache_home, monkeypatch, caplog
):
    (cache_home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home / "file"))
    assert compile_cache.turn_on() is None
    assert "not kept" in caplog.text


def test_a_user_without_a_home_directory_gets_a_warning(
    cache_home, monkeypatch, caplog
):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "relative")
    assert compile_cache.turn_on() is None
    assert "no home directory; set XDG_CACHE_HOME" in caplog.text


@pytest.mark.slow
def test_the_second_start_finds_what_the_first_compiled(tmp_path):
    programs = []
    for workdir in ("first", "second"):
        code, output = runs.run(
            tmp_path / workdir,
            *runs.SMALL,
            *("--config.total.steps=1", "--config.optim.warmup.steps=0"),
            JAX_COMPILATION_CACHE_DIR="",
            XDG_CACHE_HOME=str(tmp_path),
        )
        assert code == 0, output
        parts = r"first step after .* imports .* data .* state .* compiling .* step"
        assert re.search(parts, output)
        programs.append(set(tmp_path.glob("resnet_jax/compiled/*/*-cache")))
    assert any("train_step" in path.name for path in programs[0])
    assert programs[1] == programs[0]
