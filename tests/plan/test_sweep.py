"""The search for options of the compiler, with a compiler that is made up."""

import runpy

import pytest

from resnet_jax.errors import UserError
from resnet_jax.plan import sweep
from tests import tiny

SAVED = {"a": 100, "b": 300, "c": -50}


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """Options save a number of 10,000 cycles, and more of them more; `d` is refused."""

    def ask(config, topology, per_chip, evaluation):
        options = config.compiler_options
        if "d" in options:
            raise UserError("no such option")
        saved = sum(SAVED[name] * options[name] for name in options)
        memory = {"activations": 5e9}
        train = {"cycles": 10_000 - saved, "bytes": 2e6, "memory": memory}
        return {"batch_size": 8, "devices": 2, "train": train}

    monkeypatch.setattr(sweep, "ask", ask)
    monkeypatch.setattr(sweep, "KEPT", tmp_path)
    candidates = ({"a": 1}, {"a": 2}, {"b": 1}, {"c": 1}, {"d": 1})
    monkeypatch.setattr(sweep, "CANDIDATES", candidates)
    return tmp_path


def test_what_helps_is_kept_together(compiler):
    said = []
    sweep.run(tiny.config(), "v5e:2x2", 4, "the command", said.append)
    kept = runpy.run_path(compiler / "v5e.py")
    assert kept["OPTIONS"] == {"a": 2, "b": 1}
    assert "the command" in kept["__doc__"]
    table = said[0].splitlines()
    assert "| `a=2`, `b=1` | 2.4 | 0 | 5.00 GB | kept |" in table
    assert "| `c=1` | 2.5 | 0 | 5.00 GB | +0.5% |" in table
    assert "| `d=1` | | | | refused |" in table


def test_where_nothing_helps_nothing_is_kept(compiler, monkeypatch):
    monkeypatch.setattr(sweep, "CANDIDATES", ({"c": 1}, {"d": 1}))
    sweep.run(tiny.config(), "v5e:2x2", 4, "the command", lambda _: None)
    assert runpy.run_path(compiler / "v5e.py")["OPTIONS"] == {}


def test_only_compilers_that_tell_cycles_can_be_compared(compiler):
    with pytest.raises(UserError, match="only compilers for TPUs"):
        sweep.run(tiny.config(), "local", 4, "the command")
