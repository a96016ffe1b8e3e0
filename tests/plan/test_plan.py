"""`python -m resnet_jax.plan`: what it takes, and what it tells."""

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
from resnet_jax.plan.ask import ask
from resnet_jax.plan.predict import predict
from resnet_jax.plan.table import amount, as_text
from tests.helpers import runs, tiny
from tests.plan.test_predict import facts, two_slices

TINY = (
    "--config=configs/quickstart.py",
    "--config.batch_size=16",
    "--config.model.bn_group_size=2",
    "--config.model.overrides={'stage_sizes': (1, 1), 'widths': (8, 16), 'stem':"
    " ((3, 1, 8),), 'shortcut': 'projection'}",
)


@pytest.fixture
def no_compiler(monkeypatch):
    """Fails if a compiler is asked."""

    def run(*_, **__):
        raise AssertionError("a compiler was asked")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--price=nan", "'nan' is not one or more prices above 0"),
        ("--price=-3", "'-3' is not one or more prices above 0"),
        ("--per_chip=1.5", "'1.5' is not a whole number above 0"),
        ("--batch_size=", "'' is not a whole number above 0"),
    ],
)
def test_numbers_that_cannot_be_are_told(flag, message, no_compiler):
    with pytest.raises(UserError, match=message):
        command.main(["plan", *TINY[:1], flag])


@pytest.mark.parametrize("rate", ["nan", "inf", "-5", "1e-320", "0"])
def test_a_rate_that_cannot_be_is_told(rate, no_compiler):
    with pytest.raises(UserError, match=rf"--input_rate={rate} is neither a number"):
        command.main(["plan", *TINY[:1], f"--input_rate={rate}"])


def test_a_sharding_that_is_not_there_is_told_at_once(no_compiler):
    message = r"no sharding\.params='fdsp'\. Did you mean fsdp\?"
    with pytest.raises(UserError, match=message):
        command.main(["plan", *TINY[:1], "--sharding=replicated,fdsp"])


def test_without_libtpu_the_way_to_it_is_told(monkeypatch, no_compiler):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs libtpu, .*: pip install libtpu$"):
        ask(tiny.config(), "v5e:2x4")


# What is told.


def test_plans_stand_side_by_side():
    # Four of these: half of the cycles, and no limit is reached.
    other = facts(topology="v4:2x2x1", chip="v4", kind="TPU v4", devices=4, chips=4)
    unfit = {"wanted": 2**34, "limit": 15 * 2**30, "seconds": 1.0}
    plans = [facts(), other, facts(train=unfit, batch_size=4096)]
    text = as_text([(one, predict(one, price=2.0)) for one in plans])
    rows = {line.strip()[:24].strip(): line.split() for line in text.splitlines()}
    assert rows["topology"][1:] == ["v5e:2x4", "v4:2x2x1", "v5e:2x4"]
    assert rows["parameters"][1:] == ["3.0", "GiB", "3.0", "GiB"]
    assert rows["bound by"][2:] == ["memory", "memory"]
    # 128 images in 100.9 ms.
    assert rows["images/s/chip"][1] == "1,269"
    assert rows["by the compiler alone"][4] == "1,269"
    assert rows["calibrated by"][2] == "none"
    assert float(rows["calibrated by"][3].rstrip("*")) == pytest.approx(
        calibration.factor_of("v4"), abs=0.005
    )
    # Each published rate stands there with its deviation.
    for one, deviation in calibration.deviations("v4"):
        told = f"{one.rate:,.0f} images/s/chip ({100 * deviation:+.0f} %)"
        assert f"{told} on {one.chips:,} chips" in text and one.source in text
    assert "v5e: not calibrated" in text
    assert "v5e:2x4, batch 4096: does not fit: a device wants 16.0 GiB of 15.0" in text
    assert "optim.microbatches=2" in text
    assert "cloud.google.com/tpu/docs/v4" in text
    assert text.endswith("jax 1.2.3")


def table_of(libtpu: str, chip: str) -> tuple[dict, str]:
    """Returns the prediction and the table of a plan that a version of libtpu made."""
    one = facts(
        topology=f"{chip}:2x2x1",
        chip=chip,
        devices=4,
        chips=4,
        versions={"libtpu": libtpu, "jax": "1.2.3"},
    )
    found = predict(one, price=2.0, input_rate=600.0)
    return found, as_text([(one, found)])


def test_rates_that_were_calibrated_with_another_libtpu_are_marked():
    version = calibration.STOCK["v4"].libtpu
    found, text = table_of(version, "v4")
    assert found["calibrated"]
    assert f"libtpu {version}" in text and "*" not in text
    found, text = table_of("0.0.42.1", "v4")
    assert not found["calibrated"]
    lines = [line for line in text.splitlines() if re.search(r"\d( %)?\*$", line)]
    marked = {line[:24].strip() for line in lines}
    assert {"images/s/chip", "calibrated by", "hours", "cost"} <= marked
    # These do not depend on the factor.
    assert not {"by the compiler alone", "at most, by the peaks", "steps"} & marked
    assert "libtpu 0.0.42.1 compiled this, but the factor was calibrated" in text
    assert f"with libtpu {version}." in text
    # There is no factor for v5p.
    found, text = table_of("0.0.42.1", "v5p")
    assert not found["calibrated"] and "libtpu 0.0.42.1" in text and "*" not in text


def test_a_libtpu_that_tells_no_cycles_is_not_taken_for_a_fast_chip():
    step = facts()["train"] | {"cycles": 0}
    one = facts(train=step, versions={"libtpu": "9.9"})
    text = as_text([(one, predict(one))])
    assert "libtpu 9.9 does not say how many cycles" in text


def test_slices_stand_beside_one_and_rows_stay_in_their_section():
    plans = [facts(), two_slices(), two_slices(topology="2*v4:2x2x2", chip="v4")]
    text = as_text([(one, predict(one)) for one in plans])
    rows = {line.strip()[:24].strip(): line.split() for line in text.splitlines()}
    assert rows["topology"][1:] == ["v5e:2x4", "2*v5e:2x4", "2*v4:2x2x2"]
    assert rows["of it between slices"][4:] == ["4.00", "ms"]
    # 12.5 MB.
    assert rows["all-reduce over 2 slices"][4:] == 2 * ["1", "x,", "11.9", "MiB"]
    assert rows["sent by a chip to other"][7:] == 2 * ["11.9", "MiB"]
    assert "between slices 3.1 GB/s" in text
    message = "2*v4:2x2x2, batch 2048: no speed, hours, cores or cost, since no bandwid"
    assert message in text
    labels = list(rows)
    assert (
        labels.index("NETWORK, A STEP")
        < labels.index("all-reduce over all")
        < labels.index("HOST")
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (16 * 2**30, "16.0 GiB")],
)
def test_bytes_are_told_in_fitting_units(number, text):
    assert amount(number) == text


def test_the_largest_batch_is_searched_from_the_one_that_is_planned(monkeypatch):
    tried = []

    def answer(config, topology, *, per_chip, evaluation):
        assert (topology, evaluation) == ("v5e:2x4", False)
        tried.append(per_chip)
        if per_chip > 500:
            # As libtpu refuses: by the temporaries alone, of less than there is.
            train = {"wanted": per_chip * 2**25, "limit": 15 * 2**30, "seconds": 1.0}
        else:
            memory = {"parameters": 2**30, "activations": per_chip * 2**25}
            train = facts()["train"] | {"memory": memory}
        return facts(train=train, batch_size=8 * per_chip)

    monkeypatch.setattr(command, "ask", answer)
    config = load("configs/r50.py")
    fits, fails = command.search(config, facts())
    # 448 images and the parameters are 15 GiB of 16, and 480 all.
    assert 0.9 * 480 < fits <= 480 and fits < fails <= fits * 17 / 16 + 4
    # What was planned is not asked again, and groups of 32 images stay whole.
    assert 128 not in tried
    assert all(number * 8 % 32 == 0 for number in tried)


def test_a_batch_that_the_config_refuses_ends_the_search(monkeypatch, capsys):
    def answer(config, topology, *, per_chip, evaluation):
        assert config.optim.warmup.to_dict() == {"steps": 0}
        if per_chip > 128:
            raise UserError("The data has 5,000 images.")
        memory = {"parameters": 2**30, "activations": per_chip}
        return facts(train=facts()["train"] | {"memory": memory})

    monkeypatch.setattr(command, "ask", answer)
    assert command.search(load("configs/r50.py"), facts()) == (128, 0)
    assert "no larger batch was tried: The data has" in capsys.readouterr().err


def test_topologies_and_sizes_are_compared_in_one_call(monkeypatch, capsys):
    def answer(config, topology, *, per_chip, fresh):
        assert not fresh
        asked.append(config.sharding.params)
        chip = topology.partition(":")[0]
        return facts(topology=topology, chip=chip, batch_size=8 * per_chip)

    asked = []

    monkeypatch.setattr(command, "ask", answer)
    arguments = ["--config=configs/r50.py", "--topology=v5e:2x4,v4:2x2x2", "--json"]
    arguments += ["--per_chip=64,128", "--price=1.5,4", "--input_rate=600"]
    command.main(["plan", *arguments])
    rows = json.loads(capsys.readouterr().out)
    found = [
        (row["compiled"]["topology"], row["compiled"]["batch_size"]) for row in rows
    ]
    small, large = 512, 1024
    assert found == [(t, b) for t in ("v5e:2x4", "v4:2x2x2") for b in (small, large)]
    for row, price in zip(rows, (1.5, 1.5, 4, 4), strict=True):
        predicted = row["predicted"]
        assert predicted["cost"] == pytest.approx(predicted["hours"] * 8 * price)
        assert predicted["cores"] >= predicted["host_rate"] / 600
    assert asked == 4 * ["replicated"]
    asked.clear()
    arguments = ["--config=configs/r50.py", "--topology=v5e:2x4", "--per_chip=64"]
    command.main(["plan", *arguments, "--sharding=replicated,fsdp"])
    assert asked == ["replicated", "fsdp"]


def test_the_rate_of_the_input_is_read_from_its_benchmark(tmp_path):
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
    return {
        "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache")),
        "JAX_NUM_CPU_DEVICES": "8",
    }


def plan(*arguments: str, **environment: str) -> tuple[int, str]:
    return runs.run_python("-m", "resnet_jax.plan", *arguments, **environment)


def test_what_was_compiled_is_told_though_the_next_is_refused(monkeypatch, capsys):
    def answer(config, topology, *, per_chip, fresh):
        if per_chip == 63:
            raise UserError("63 is refused.")
        return facts(topology=topology, batch_size=8 * per_chip)

    monkeypatch.setattr(command, "ask", answer)
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
    # No figures are made up for what nobody has published.
    assert "images/s/chip" not in output and "no speed" in output
    code, output = plan(*TINY, "--json", **home)
    assert code == 0, output
    # What is known is not compiled again, which is told on the same pipe.
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
def test_mistakes_get_a_sentence(arguments, message, home):
    code, output = plan(*TINY, *arguments, **home)
    assert code != 0
    assert message in output and "Traceback" not in output
