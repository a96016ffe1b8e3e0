"""Tests of the process that compiles, and of the figures that are kept on disk."""

import subprocess

import jax
import pytest

from resnet_jax.compiler.chips import LOCAL
from resnet_jax.errors import UserError
from resnet_jax.persistence import versions
from resnet_jax.plan import compile_subprocess
from resnet_jax.plan.compile_subprocess import compile_config, key_of
from tests.helpers import tiny
from tests.helpers.pictures import encode, noise, write_folder

# The shortest valid output of a process that compiles.
ANSWER = '{"devices": 8, "train": {}}\n'


def test_the_same_question_is_compiled_once(cache, monkeypatch):
    compiled = []

    def run(command, *, input, **_):
        compiled.append(input)
        return subprocess.CompletedProcess(command, 0, ANSWER, "")

    monkeypatch.setattr(subprocess, "run", run)
    config = tiny.config()
    first = compile_config(config, LOCAL)
    assert compile_config(config, LOCAL) == first
    assert len(compiled) == 1
    assert first["versions"]["jax"] == jax.__version__
    (kept,) = cache.iterdir()
    assert kept.stat().st_mode & 0o077 == cache.stat().st_mode & 0o077 == 0
    compile_config(config, LOCAL, fresh=True)
    assert len(compiled) == 2
    compile_config(config, LOCAL, per_chip=2)
    assert len(compiled) == 3


def test_different_questions_have_different_keys(monkeypatch):
    request = {"config": tiny.config().to_dict(), "topology": LOCAL}
    keys = {key_of(request)}
    keys.add(key_of(request | {"topology": "v5e:2x4"}))
    keys.add(key_of(request | {"config": tiny.config({"seed": 1}).to_dict()}))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    keys.add(key_of(request))
    monkeypatch.setattr(compile_subprocess, "compiler_versions", lambda: {"jax": "99"})
    keys.add(key_of(request))
    monkeypatch.setattr(compile_subprocess, "code", lambda: "another version")
    keys.add(key_of(request))
    assert len(keys) == 6


def test_the_digest_covers_only_code_that_affects_a_step(tmp_path, monkeypatch):
    files = {
        "resnet_jax/plan/table.py": False,
        "resnet_jax/bench/input.py": False,
        "resnet_jax/training/step.py": True,
        "resnet_jax/plan/hlo.py": True,
        # The compiler options depend on the chip, and are not part of the config.
        "resnet_jax/compiler/options.py": True,
    }
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(versions, "PACKAGE", tmp_path / "resnet_jax")
    before = compile_subprocess.code()
    for name, counts in files.items():
        (tmp_path / name).write_text("changed")
        assert (compile_subprocess.code() != before) == counts
        before = compile_subprocess.code()


def test_a_crash_of_the_compiler_is_reported(cache, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(
            command, -6, "", "I: loading\nCheck failed\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    message = r"compiler failed for local \(ended by signal 6\): Check failed"
    with pytest.raises(UserError, match=message):
        compile_config(tiny.config(), LOCAL)
    assert not list(cache.iterdir())


def test_the_exception_of_a_traceback_is_reported(cache, monkeypatch):
    stderr = "Traceback:\n  x = y\nValueError: too large\n\nFor simplicity, JAX has\n"

    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"\(exit code 1\): ValueError: too large$"):
        compile_config(tiny.config(), LOCAL)


def test_new_images_make_a_new_question(cache, monkeypatch, tmp_path):
    compiled = []

    def run(command, *, input, **_):
        compiled.append(input)
        return subprocess.CompletedProcess(command, 0, ANSWER, "")

    monkeypatch.setattr(subprocess, "run", run)
    image = encode(noise(0, 8, 8), "PNG")
    files = {f"{split}/cat/0.png": image for split in ("train", "test")}
    folder = write_folder(tmp_path / "images", files)
    config = tiny.config({"data.source": folder, "data.eval_split": "test"})
    compile_config(config, LOCAL)
    compile_config(config, LOCAL)
    assert len(compiled) == 1
    (tmp_path / "images" / "train" / "cat" / "1.png").write_bytes(image)
    compile_config(config, LOCAL)
    assert len(compiled) == 2


@pytest.mark.parametrize("content", ["", '{"devices', '{"versions": {}}', "[]", None])
def test_a_damaged_file_of_figures_is_compiled_again(cache, monkeypatch, content):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, ANSWER, "")

    monkeypatch.setattr(subprocess, "run", run)
    first = compile_config(tiny.config(), LOCAL)
    (kept,) = cache.iterdir()
    if content is None:
        kept.unlink()
        kept.mkdir()
    else:
        kept.write_text(content)
    assert compile_config(tiny.config(), LOCAL) == first


def test_without_a_home_directory_figures_are_not_kept(monkeypatch, capsys):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, ANSWER, "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("HOME", "relative")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert compile_config(tiny.config(), LOCAL)["devices"] == 8
    assert (
        "figures of this compilation are not kept: there is no home"
        in capsys.readouterr().err
    )
