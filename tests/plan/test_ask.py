"""Which answers of compilers are kept, and when they are asked anew."""

import pathlib
import subprocess

import jax
import pytest

from resnet_jax.compiler.chips import LOCAL
from resnet_jax.errors import UserError
from resnet_jax.persistence import versions
from resnet_jax.plan import ask as ask_module
from resnet_jax.plan.ask import ask, key_of
from tests.helpers import tiny
from tests.helpers.pictures import encode, noise, write_folder

# What a compiler's process prints at least.
ANSWER = '{"devices": 8, "train": {}}\n'


def test_an_answer_is_asked_for_once(cache, monkeypatch):
    asked = []

    def run(command, *, input, **_):
        asked.append(input)
        return subprocess.CompletedProcess(command, 0, ANSWER, "")

    monkeypatch.setattr(subprocess, "run", run)
    config = tiny.config()
    first = ask(config, LOCAL)
    assert ask(config, LOCAL) == first
    assert len(asked) == 1
    assert first["versions"]["jax"] == jax.__version__
    (kept,) = cache.iterdir()
    assert kept.stat().st_mode & 0o077 == cache.stat().st_mode & 0o077 == 0
    ask(config, LOCAL, fresh=True)
    assert len(asked) == 2
    ask(config, LOCAL, per_chip=2)
    assert len(asked) == 3


def test_another_question_has_another_name(monkeypatch):
    request = {"config": tiny.config().to_dict(), "topology": LOCAL}
    names = {key_of(request)}
    names.add(key_of(request | {"topology": "v5e:2x4"}))
    names.add(key_of(request | {"config": tiny.config({"seed": 1}).to_dict()}))
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536")
    names.add(key_of(request))
    monkeypatch.setattr(ask_module, "compiler_versions", lambda: {"jax": "99"})
    names.add(key_of(request))
    monkeypatch.setattr(ask_module, "code", lambda: "other")
    names.add(key_of(request))
    assert len(names) == 6


def test_the_code_that_counts_is_what_steps_are_made_of(tmp_path, monkeypatch):
    files = {
        "resnet_jax/plan/table.py": False,
        "resnet_jax/bench/input.py": False,
        "resnet_jax/training/step.py": True,
        "resnet_jax/plan/hlo.py": True,
        # Its options are chosen by the chip, and stand in no config.
        "resnet_jax/compiler/options.py": True,
    }
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(versions, "PACKAGE", tmp_path / "resnet_jax")
    before = ask_module.code()
    for name, counts in files.items():
        (tmp_path / name).write_text("changed")
        assert (ask_module.code() != before) == counts
        before = ask_module.code()


def test_a_compiler_that_breaks_is_told_in_a_sentence(cache, monkeypatch):
    def run(command, **_):
        return subprocess.CompletedProcess(
            command, -6, "", "I: loading\nCheck failed\n"
        )

    monkeypatch.setattr(subprocess, "run", run)
    message = r"compiler failed for local \(ended by signal 6\): Check failed"
    with pytest.raises(UserError, match=message):
        ask(tiny.config(), LOCAL)
    assert not list(cache.iterdir())


def test_of_a_traceback_the_exception_is_told(cache, monkeypatch):
    told = "Traceback:\n  x = y\nValueError: too large\n\nFor simplicity, JAX has\n"

    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", told)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match=r"\(exit code 1\): ValueError: too large$"):
        ask(tiny.config(), LOCAL)


def test_data_that_grew_is_another_question(cache, monkeypatch, tmp_path):
    asked = []

    def run(command, *, input, **_):
        asked.append(input)
        return subprocess.CompletedProcess(command, 0, ANSWER, "")

    monkeypatch.setattr(subprocess, "run", run)
    one = encode(noise(0, 8, 8), "PNG")
    files = {f"{split}/cat/0.png": one for split in ("train", "test")}
    folder = write_folder(tmp_path / "images", files)
    config = tiny.config({"data.source": folder, "data.eval_split": "test"})
    ask(config, LOCAL)
    ask(config, LOCAL)
    assert len(asked) == 1
    (tmp_path / "images" / "train" / "cat" / "1.png").write_bytes(one)
    ask(config, LOCAL)
    assert len(asked) == 2


@pytest.mark.parametrize("content", ["", '{"devices', '{"versions": {}}', "[]", None])
def test_a_damaged_answer_is_asked_for_again(cache, monkeypatch, content):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, ANSWER, "")

    monkeypatch.setattr(subprocess, "run", run)
    first = ask(tiny.config(), LOCAL)
    (kept,) = cache.iterdir()
    if content is None:
        kept.unlink()
        kept.mkdir()
    else:
        kept.write_text(content)
    assert ask(tiny.config(), LOCAL) == first


def test_without_a_home_answers_are_not_kept(monkeypatch, capsys):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, ANSWER, "")

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(pathlib.Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert ask(tiny.config(), LOCAL)["devices"] == 8
    assert "answers are not kept: there is no home" in capsys.readouterr().err
