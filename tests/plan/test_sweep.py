"""The search for options of the compiler, with a compiler that is made up."""

import pytest

from resnet_jax.errors import UserError
from resnet_jax.plan import sweep
from tests.helpers import tiny

SAVED = {"a": 100, "b": 300, "c": -50, "e": 0}


@pytest.fixture
def compiler(monkeypatch):
    """Options save a number of 10,000 cycles, and more of them more; `d` is refused."""

    def ask(config, topology, per_chip, evaluation):
        options = config.compiler_options
        if "d" in options:
            raise UserError("no such option")
        saved = sum(SAVED[name] * options[name] for name in options)
        # Scanning costs a tenth; twice the images cost less than twice the cycles.
        cycles = (10_000 - saved) * (1.1 if config.model.scan_blocks else 1)
        # So does writing what need not be written, a fifth.
        cycles *= 1 if config.model.unwritten else 1.2
        cycles *= {2: 0.5, 4: 1, 8: 1.9}[per_chip]
        train = {"cycles": cycles, "bytes": 6e6, "hbm_bytes": 4e6}
        train["memory"] = {"activations": 5e9}
        return {"batch_size": 2 * per_chip, "devices": 2, "train": train}

    monkeypatch.setattr(sweep, "ask", ask)
    candidates = ({"a": 1}, {"a": 2}, {"b": 1}, {"c": 1}, {"d": 1}, {"e": 1})
    monkeypatch.setattr(sweep, "CANDIDATES", candidates)


def test_what_helps_is_kept_together(compiler):
    said = []
    sweep.run(tiny.config(), "v5e:2x2", 4, said.append)
    assert "--config.compiler_options=\"{'a': 2, 'b': 1}\"" in said[1]
    table = said[0].splitlines()
    assert "| `a=2`, `b=1` | 2.4 | 2 | 1 MB | 5.00 GB | kept |" in table
    kept = "`a=2`, `b=1`"
    assert f"| {kept}, `c=1` | 2.4 | 2 | 1 MB | 5.00 GB | -4.5% |" in table
    assert f"| {kept}, `d=1` | | | | | refused: no such option |" in table
    assert f"| {kept}, `e=1` | 2.4 | 2 | 1 MB | 5.00 GB | the same program |" in table
    # Variants of the step come with what is kept, and are not kept themselves.
    assert table[-4:] == [
        f"| {kept}, model.scan_blocks=True | 2.6 | 2 | 1 MB | 5.00 GB |"
        " +10.0% against what is kept |",
        f"| {kept}, model.unwritten=False | 2.9 | 2 | 1 MB | 5.00 GB |"
        " +20.0% against what is kept |",
        f"| {kept}, 2 images a chip | 2.4 | 3 | 2 MB | 5.00 GB |"
        " +0.0% against what is kept |",
        f"| {kept}, 8 images a chip | 2.3 | 1 | 0 MB | 5.00 GB |"
        " -5.0% against what is kept |",
    ]


def test_of_options_with_as_many_cycles_the_one_with_fewest_bytes_is_kept():
    plain = {"variant": "", "cycles": 1000.0, "bytes": 400.0}
    first = plain | {"cycles": 990.0, "bytes": 350.0}
    second = plain | {"cycles": 990.1, "bytes": 330.0}
    fewer, refused = plain | {"bytes": 399.9}, {"variant": "", "refused": "why"}
    assert sweep.best_of([plain, first, second, refused]) is second
    assert sweep.best_of([plain, second, first]) is second
    assert sweep.best_of([plain, fewer, second | {"variant": "other"}]) is plain


def test_three_percent_fewer_bytes_are_worth_one_of_cycles():
    plain = {"variant": "", "cycles": 1000.0, "bytes": 400.0}
    assert sweep.is_better(plain | {"cycles": 1009.0, "bytes": 386.0}, plain)
    assert not sweep.is_better(plain | {"cycles": 1009.0, "bytes": 390.0}, plain)
    assert not sweep.is_better(plain | {"cycles": 1100.0, "bytes": 320.0}, plain)


def test_where_nothing_helps_no_options_are_best(compiler, monkeypatch):
    monkeypatch.setattr(sweep, "CANDIDATES", ({"c": 1}, {"d": 1}))
    said = []
    sweep.run(tiny.config(), "v5e:2x2", 4, said.append)
    assert '--config.compiler_options="{}"' in said[1]


def test_only_compilers_that_tell_cycles_can_be_compared(compiler):
    with pytest.raises(UserError, match="only compilers for TPUs"):
        sweep.run(tiny.config(), "local", 4)
