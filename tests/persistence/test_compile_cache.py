"""The cache of compiled programs: on by default, and the user's own."""

import pathlib
import re

import jax
import pytest

from resnet_jax.persistence import compile_cache
from tests.helpers import runs


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache directory of the user, and jax without one."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_where_only_the_user_writes(home):
    path = compile_cache.turn_on()
    assert home in path.parents
    assert path.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(path)


def test_a_directory_of_the_users_choice_is_left(home):
    jax.config.update("jax_compilation_cache_dir", str(home / "mine"))
    assert compile_cache.turn_on() == home / "mine"
    assert not compile_cache.directory().exists()


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_write_to_is_not_used(mode, home, caplog):
    compile_cache.directory().mkdir(parents=True)
    compile_cache.directory().chmod(mode)
    assert compile_cache.turn_on() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert "others may write to" in caplog.text


def test_without_a_home_it_is_told_and_done_without(home, monkeypatch, caplog):
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert compile_cache.turn_on() is None
    assert "not kept" in caplog.text


def test_who_has_no_home_does_without(home, monkeypatch, caplog):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(pathlib.Path, "home", nowhere)
    assert compile_cache.turn_on() is None
    assert "no home directory; set XDG_CACHE_HOME" in caplog.text


@pytest.mark.slow
def test_the_second_start_finds_what_the_first_compiled(tmp_path):
    kept = []
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
        kept.append(set(tmp_path.glob("resnet_jax/compiled/*/*-cache")))
    assert any("train_step" in path.name for path in kept[0])
    assert kept[1] == kept[0]
