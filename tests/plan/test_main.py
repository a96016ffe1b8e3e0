"""Tests of the command `python -m resnet_jax.plan`: its flags and its output."""

import importlib.util
import json
import re
import subprocess

import pytest

from resnet_jax.bench import input, table
from resnet_jax.config import load
from resnet_jax.errors import UserError
from resnet_jax.plan import __main__ as command
from resnet_jax.plan import calibration
from resnet_jax.plan.compile_subprocess import compile_config
from resnet_jax.plan.estimate import estimate
from resnet_jax.plan.table import amount, as_text
from tests.helpers import runs, tiny
from tests.helpers.plans import facts, two_slices

TINY = (
    "--config=configs/quickstart.py",
    "--config.batch_size=16",
    "--config.model.bn_group_size=2",
    "--config.model.overrides={'stage_sizes': (1, 1), 'widths': (8, 16), 'stem':"
    " ((3, 1, 8),), 'shortcut': 'projection'}",
)


@pytest.fixture
def no_compiler(monkeypatch):
    """Lets the test fail if a compiler is started."""

    def run(*_, **__):
        raise AssertionError("a compiler was started")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--price=nan", "'nan' is not a number above 0"),
        ("--price=-3", "'-3' is not a number above 0"),
        ("--per_chip=1.5", "'1.5' is not a whole number above 0"),
        ("--batch_size=", "--batch_size is empty; is a variable unset?"),
    ],
)
def test_invalid_numbers_are_reported(flag, message, no_compiler):
    with pytest.raises(UserError, match=message):
        command.main(["plan", *TINY[:1], flag])


@pytest.mark.parametrize("rate", ["nan", "inf", "-5", "1e-320", "0"])
def test_an_invalid_input_rate_is_reported(rate, no_compiler):
    with pytest.raises(UserError, match=rf"--input_rate={rate} is neither a number"):
        command.main(["plan", *TINY[:1], f"--input_rate={rate}"])


def test_an_unknown_sharding_is_reported_before_compiling(no_compiler):
    message = r"no sharding\.params='fdsp'\. Did you mean fsdp\?"
    with pytest.raises(UserError, match=message):
        command.main(["plan", *TINY[:1], "--sharding=replicated,fdsp"])


def test_the_error_without_libtpu_tells_how_to_install_it(monkeypatch, no_compiler):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu, .*: pip install libtpu$"):
        compile_config(tiny.config(), "v5e:2x4")


# Tests of the output.


def test_plans_are_printed_side_by_side():
    # The second plan is for four chips with a published rate, which calibrates them.
    v4 = facts(topology="v4:2x2x1", chip="v4", kind="TPU v4", devices=4, chips=4)
    unfit = {"wanted": 2**34, "limit": 15 * 2**30, "seconds": 1.0}
    plans = [facts(), v4, facts(train=unfit, batch_size=4096)]
    text = as_text([(plan, estimate(plan, price=2.0)) for plan in plans])
    rows = {line.strip()[:24].strip(): line.split() for line in text.splitlines()}
    assert rows["topology"][1:] == ["v5e:2x4", "v4:2x2x1", "v5e:2x4"]
    assert rows["parameters"][1:] == ["3.0", "GiB", "3.0", "GiB"]
    assert rows["bound by"][2:] == ["memory", "memory"]
    # A chip computes 128 images in 100.9 ms.
    assert rows["images/s/chip"][1] == "1,269"
    assert rows["by the compiler alone"][4] == "1,269"
    assert rows["calibrated by"][2] == "none"
    assert float(rows["calibrated by"][3].rstrip("*")) == pytest.approx(
        calibration.factor_of("v4"), abs=0.005
    )
    # Each published rate is printed with its deviation.
    for published, deviation in calibration.deviations("v4"):
        rate = f"{published.rate:,.0f} images/s/chip ({100 * deviation:+.0f} %)"
        assert f"{rate} on {published.chips:,} chips" in text
        assert published.source in text
    assert "v5e is not calibrated" in text
    assert "v5e:2x4, batch 4096: does not fit: a device needs 16.0 GiB of 15.0" in text
    assert "optim.microbatches=2" in text
    assert "cloud.google.com/tpu/docs/v4" in text
    assert text.endswith("jax 1.2.3")


def table_of(libtpu: str, chip: str) -> tuple[dict, str]:
    """Returns the prediction and the printed table of a plan by a version of libtpu."""
    plan = facts(
        topology=f"{chip}:2x2x1",
        chip=chip,
        devices=4,
        chips=4,
        versions={"libtpu": libtpu, "jax": "1.2.3"},
    )
    predicted = estimate(plan, price=2.0, input_rate=600.0)
    return predicted, as_text([(plan, predicted)])


def test_rates_that_were_calibrated_with_another_libtpu_are_marked():
    version = calibration.STOCK["v4"].libtpu
    predicted, text = table_of(version, "v4")
    assert predicted["calibrated"]
    assert f"libtpu {version}" in text and "*" not in text
    predicted, text = table_of("0.0.42.1", "v4")
    assert not predicted["calibrated"]
    lines = [line for line in text.splitlines() if re.search(r"\d( %)?\*$", line)]
    marked = {line[:24].strip() for line in lines}
    assert {"images/s/chip", "calibrated by", "hours", "cost"} <= marked
    # These rows do not depend on the factor.
    assert not {"by the compiler alone", "at most, by the peaks", "steps"} & marked
    assert "libtpu 0.0.42.1 compiled this plan, but the factor was calibrated" in text
    assert f"with libtpu {version}." in text
    # v5p has no factor.
    predicted, text = table_of("0.0.42.1", "v5p")
    assert not predicted["calibrated"] and "libtpu 0.0.42.1" in text and "*" not in text


def test_a_plan_without_estimated_cycles_says_so():
    step = facts()["train"] | {"cycles": 0}
    plan = facts(train=step, versions={"libtpu": "9.9"})
    text = as_text([(plan, estimate(plan))])
    assert "libtpu 9.9 does not estimate the cycles" in text


def test_a_plan_for_one_cpu_names_neither_a_network_nor_a_missing_compiler():
    train = facts()["train"] | {"collectives": []}
    changes = {"topology": "local", "chip": "", "devices": 1}
    plan = facts(train=train, versions={"jax": "9.9", "libtpu": ""}, **changes)
    text = as_text([(plan, estimate(plan))])
    assert "NETWORK" not in text
    assert "libtpu" not in text


def test_plans_for_several_slices_have_rows_for_the_network_between_them():
    plans = [facts(), two_slices(), two_slices(topology="2*v4:2x2x2", chip="v4")]
    text = as_text([(plan, estimate(plan)) for plan in plans])
    rows = {line.strip()[:24].strip(): line.split() for line in text.splitlines()}
    assert rows["topology"][1:] == ["v5e:2x4", "2*v5e:2x4", "2*v4:2x2x2"]
    assert rows["of it between slices"][4:] == ["4.00", "ms"]
    # A chip sends 12.5 MB.
    assert rows["all-reduce over 2 slices"][4:] == 2 * ["1", "x,", "11.9", "MiB"]
    assert rows["sent by a chip to other"][7:] == 2 * ["11.9", "MiB"]
    assert "between slices 3.1 GB/s" in text
    message = "2*v4:2x2x2, batch 2048: no speed, hours, cores or cost, since no bandwid"
    assert message in text
    labels = list(rows)
    assert (
        labels.index("NETWORK, PER STEP")
        < labels.index("all-reduce over all")
        < labels.index("HOST")
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (16 * 2**30, "16.0 GiB")],
)
def test_amounts_of_bytes_have_a_suitable_unit(number, text):
    assert amount(number) == text


def test_the_search_for_the_largest_batch_starts_at_the_planned_batch():
    tried = []

    def answer(config, topology, *, per_chip, evaluation):
        assert (topology, evaluation) == ("v5e:2x4", False)
        tried.append(per_chip)
        if per_chip > 500:
            # libtpu compares only the temporaries, with less than the whole memory.
            train = {"wanted": per_chip * 2**25, "limit": 15 * 2**30, "seconds": 1.0}
        else:
            memory = {"parameters": 2**30, "activations": per_chip * 2**25}
            train = facts()["train"] | {"memory": memory}
        return facts(train=train, batch_size=8 * per_chip)

    fits, fails = command.search(load("configs/r50.py"), facts(), compile_config=answer)
    # 448 images and the parameters take 15 GiB; 480 take all 16 GiB.
    assert 0.9 * 480 < fits <= 480 and fits < fails <= fits * 17 / 16 + 4
    # The planned batch is not compiled again, and ghost batches have 32 images.
    assert 128 not in tried
    assert all(number * 8 % 32 == 0 for number in tried)


def test_a_batch_that_the_config_refuses_ends_the_search(capsys):
    def answer(config, topology, *, per_chip, evaluation):
        assert config.optim.warmup.to_dict() == {"steps": 0}
        if per_chip > 128:
            raise UserError("The data has 5,000 images.")
        memory = {"parameters": 2**30, "activations": per_chip}
        return facts(train=facts()["train"] | {"memory": memory})

    assert command.search(load("configs/r50.py"), facts(), compile_config=answer) == (
        128,
        0,
    )
    note = "The search ends without a larger batch: The data has"
    assert note in capsys.readouterr().err


def test_one_call_plans_all_topologies_and_batch_sizes(monkeypatch, capsys):
    def answer(config, topology, *, per_chip, fresh):
        assert not fresh
        shardings.append(config.sharding.params)
        chip = topology.partition(":")[0]
        return facts(topology=topology, chip=chip, batch_size=8 * per_chip)

    shardings = []
    monkeypatch.setattr(command, "compile_config", answer)
    arguments = ["--config=configs/r50.py", "--topology=v5e:2x4,v4:2x2x2", "--json"]
    arguments += ["--per_chip=64,128", "--price=1.5,4", "--input_rate=600"]
    command.main(["plan", *arguments])
    rows = json.loads(capsys.readouterr().out)
    planned = [
        (row["compiled"]["topology"], row["compiled"]["batch_size"]) for row in rows
    ]
    small, large = 512, 1024
    assert planned == [(t, b) for t in ("v5e:2x4", "v4:2x2x2") for b in (small, large)]
    for row, price in zip(rows, (1.5, 1.5, 4, 4), strict=True):
        predicted = row["predicted"]
        assert predicted["cost"] == pytest.approx(predicted["hours"] * 8 * price)
        assert predicted["cores"] >= predicted["host_rate"] / 600
    assert shardings == 4 * ["replicated"]
    shardings.clear()
    arguments = ["--config=configs/r50.py", "--topology=v5e:2x4", "--per_chip=64"]
    command.main(["plan", *arguments, "--sharding=replicated,fsdp"])
    assert shardings == ["replicated", "fsdp"]


def test_the_input_rate_is_read_from_the_file_of_its_benchmark(tmp_path):
    path = tmp_path / "input.json"
    rows = [
        table.row("resident memory", "MiB", [7.0]),
        table.row("random resized crop", "images/s/core", [600.0, 619.0, 620.0]),
        table.row("evaluation", "images/s/core", [400.0]),
    ]
    table.Report(path).add("bench input", table.machine(input.BENCHMARK.packages), rows)
    assert command.input_rate(str(path)) == 619
    assert command.input_rate("500.5") == 500.5
    path.write_text("{}")
    for wrong in (str(path), "no such file"):
        with pytest.raises(UserError, match="neither a number above 0 nor a file"):
            command.input_rate(wrong)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> dict[str, str]:
    """Returns environment variables with an empty cache and eight devices."""
    return {
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "JAX_NUM_CPU_DEVICES": "8",
    }


def plan(*arguments: str, **environment: str) -> tuple[int, str]:
    """Runs the command; returns its exit code and output."""
    return runs.run_python("-m", "resnet_jax.plan", *arguments, **environment)


def test_finished_plans_are_printed_even_if_a_later_one_is_refused(monkeypatch, capsys):
    def answer(config, topology, *, per_chip, fresh):
        if per_chip == 63:
            raise UserError("63 is refused.")
        return facts(topology=topology, batch_size=8 * per_chip)

    monkeypatch.setattr(command, "compile_config", answer)
    arguments = ["--config=configs/r50.py", "--topology=v5e:2x4", "--json"]
    with pytest.raises(UserError, match="63 is refused"):
        command.main(["plan", *arguments, "--per_chip=64,63,128"])
    (row,) = json.loads(capsys.readouterr().out)
    assert row["compiled"]["batch_size"] == 512
    with pytest.raises(UserError, match="63 is refused"):
        command.main(["plan", *arguments, "--per_chip=63,64"])
    assert not capsys.readouterr().out


@pytest.mark.slow
def test_a_small_run_is_planned_for_this_machine(home):
    code, output = plan(*TINY, **home)
    assert code == 0, output
    assert "8 x cpu" in output
    assert "fits" in output and "yes" in output
    assert "all-reduce over all" in output
    # There is no prediction for a chip whose peaks are not published.
    assert "images/s/chip" not in output and "no speed" in output
    code, output = plan(*TINY, "--json", **home)
    assert code == 0, output
    # The plan is not compiled again: a note of that would not be JSON.
    (row,) = json.loads(output)
    assert row["predicted"]["fits"] and row["compiled"]["devices"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--topology=v5z:2x4",), "Did you mean v5p or v5e?"),
        (("--topology=local,v5e",), "has no valid shape of a slice"),
        (("--topology=local,0*v5e:2x4",), "write, for example, 2*v5e:2x4."),
        (("--batch_size=15",), "batch_size=15 cannot be divided over 8 devices"),
        (("--per_chip=3", "--config.model.bn_group_size=5"), "does not divide"),
        (("--batch_size=0",), "'0' is not a whole number above 0"),
        (("--config.batch=1",), "The config has no key 'batch'. Did you mean"),
        (("--topology=local,v5e:2x4", "--price=1,2,3"), "3 prices for 2 topologies"),
        (
            ("--topologies=local",),
            "no flag --topologies. Did you mean --topology",
        ),
    ],
)
def test_mistakes_are_reported(arguments, message, home):
    code, output = plan(*TINY, *arguments, **home)
    assert code != 0
    assert message in output and "Traceback" not in output
