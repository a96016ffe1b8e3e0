"""Tests of the search for compiler options, with a made-up compiler."""

import functools

import pytest

from resnet_jax.errors import UserError
from resnet_jax.plan import sweep
from tests.helpers import tiny

SAVED = {"a": 100, "b": 300, "c": -50, "e": 0}


CANDIDATES = ({"a": 1}, {"a": 2}, {"b": 1}, {"c": 1}, {"d": 1}, {"e": 1})


def run(topology: str, candidates=CANDIDATES) -> list[str]:
    """Sweeps over options of a made-up compiler; returns the printed texts.

    The options save some of 10,000 cycles; `d` is refused.
    """

    def compile_config(config, topology, per_chip, evaluation):
        options = config.compiler_options
        if "d" in options:
            raise UserError("no such option")
        saved = sum(SAVED[name] * options[name] for name in options)
        # Scanned blocks cost a tenth more; twice the images take less than twice the
        # cycles.
        cycles = (10_000 - saved) * (1.1 if config.model.scan_blocks else 1)
        # Without the fused convolution + batch norm, a step takes a fifth more.
        cycles *= 1 if config.model.fused_norm else 1.2
        cycles *= {2: 0.5, 4: 1, 8: 1.9}[per_chip]
        train = {"cycles": cycles, "bytes": 6e6, "hbm_bytes": 4e6}
        train["memory"] = {"activations": 5e9}
        return {"batch_size": 2 * per_chip, "devices": 2, "train": train}

    output = []
    rows = functools.partial(
        sweep.sweep, candidates=candidates, compile_config=compile_config
    )
    sweep.run(tiny.config(), topology, 4, output.append, sweep=rows)
    return output


def test_options_that_help_are_combined():
    output = run("v5e:2x2")
    assert "--config.compiler_options=\"{'a': 2, 'b': 1}\"" in output[1]
    table = output[0].splitlines()
    assert "| `a=2`, `b=1` | 2.4 | 2 | 1 MB | 5.00 GB | kept |" in table
    kept = "`a=2`, `b=1`"
    assert f"| {kept}, `c=1` | 2.4 | 2 | 1 MB | 5.00 GB | -4.5% |" in table
    assert f"| {kept}, `d=1` | | | | | refused: no such option |" in table
    assert f"| {kept}, `e=1` | 2.4 | 2 | 1 MB | 5.00 GB | the same program |" in table
    # Variants of the step are tried with the kept options, but are not kept.
    assert table[-4:] == [
        f"| {kept}, model.scan_blocks=True | 2.6 | 2 | 1 MB | 5.00 GB |"
        " +10.0% against what is kept |",
        f"| {kept}, model.fused_norm=False | 2.9 | 2 | 1 MB | 5.00 GB |"
        " +20.0% against what is kept |",
        f"| {kept}, 2 images a chip | 2.4 | 3 | 2 MB | 5.00 GB |"
        " +0.0% against what is kept |",
        f"| {kept}, 8 images a chip | 2.3 | 1 | 0 MB | 5.00 GB |"
        " -5.0% against what is kept |",
    ]


def test_equal_cycles_are_decided_by_the_bytes():
    plain = {"variant": "", "cycles": 1000.0, "bytes": 400.0}
    first = plain | {"cycles": 990.0, "bytes": 350.0}
    second = plain | {"cycles": 990.1, "bytes": 330.0}
    fewer, refused = plain | {"bytes": 399.9}, {"variant": "", "refused": "why"}
    assert sweep.best_of([plain, first, second, refused]) is second
    assert sweep.best_of([plain, second, first]) is second
    assert sweep.best_of([plain, fewer, second | {"variant": "other"}]) is plain


def test_three_percent_fewer_bytes_outweigh_one_percent_more_cycles():
    plain = {"variant": "", "cycles": 1000.0, "bytes": 400.0}
    assert sweep.is_better(plain | {"cycles": 1009.0, "bytes": 386.0}, plain)
    assert not sweep.is_better(plain | {"cycles": 1009.0, "bytes": 390.0}, plain)
    assert not sweep.is_better(plain | {"cycles": 1100.0, "bytes": 320.0}, plain)


def test_no_options_are_best_if_none_helps():
    output = run("v5e:2x2", candidates=({"c": 1}, {"d": 1}))
    assert '--config.compiler_options="{}"' in output[1]


def test_compilers_without_estimated_cycles_are_refused():
    with pytest.raises(UserError, match="only compilers for TPUs"):
        run("local")
