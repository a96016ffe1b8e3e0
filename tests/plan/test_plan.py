"""`python -m resnet_jax.plan`: what it asks, what it keeps, what it tells."""

import importlib.util
import json
import pathlib
import subprocess

import jax
import pytest
from ml_collections import ConfigDict

from configs import r50
from resnet_jax import source
from resnet_jax.bench import input, table
from resnet_jax.errors import UserError
from resnet_jax.models.cost import count
from resnet_jax.plan import __main__ as command
from resnet_jax.plan import ask as ask_module
from resnet_jax.plan import calibration, compiled
from resnet_jax.plan.ask import ask, key_of
from resnet_jax.plan.chips import LOCAL
from resnet_jax.plan.predict import predict, total
from resnet_jax.plan.table import amount, as_text
from resnet_jax.setup import Setup, set_up
from tests import runs, tiny
from tests.data.pictures import encode, noise, write_folder
from tests.plan.test_predict import facts

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


# What the compiler is asked.


@pytest.fixture(scope="module")
def planned() -> dict:
    return compiled.facts(tiny.config({"ema_decay": 0.9}), LOCAL)


@pytest.mark.slow
def test_the_steps_are_those_that_training_compiles(planned):
    setup = tiny.setup({"ema_decay": 0.9})
    stats = setup.compile_train_step().memory_analysis()
    # As XLA counts them: arguments, results that are no arguments, the rest, code.
    assert total(planned["train"]["memory"]) == (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    stats = setup.compile_eval_step().memory_analysis()
    assert planned["eval"]["memory"]["activations"] == stats.temp_size_in_bytes


def test_memory_is_told_by_part(planned):
    memory, params = planned["train"]["memory"], planned["params"]
    assert memory["parameters"] == 4 * params
    # A momentum each, and the number of steps.
    assert memory["optimiser"] == 4 * params + 4
    assert memory["average"] == memory["parameters"] + memory["statistics"]
    # Two images of eight by eight grey pixels, and their labels.
    assert memory["batch"] == 2 * (8 * 8 + 4)
    assert memory["activations"] > 0


def test_a_run_is_described(planned):
    expected = {"batch_size": 16, "devices": 8, "chips": 8, "hosts": 1, "steps": 4}
    expected |= {"train_images": 64, "eval_images": 64, "evaluations": 1, "chip": ""}
    assert planned | expected == planned
    gradients = [one["bytes"] for one in planned["train"]["collectives"]]
    # Gradients, running statistics and two metrics, in float32.
    statistics = planned["train"]["memory"]["statistics"]
    assert sum(gradients) == 4 * planned["params"] + statistics + 2 * 4


def test_known_data_need_not_be_there():
    config = r50.get_config()
    setup = set_up(compiled.stand_in(config))
    assert len(setup.train.source) == 1_281_167
    assert len(setup.test.source) == 50_000
    assert setup.model.spec.num_classes == 1000
    # 90 epochs of 1251.1 steps.
    assert setup.total_steps == 112_603
    # Whoever asked keeps the config.
    assert config.data.source == "tfds:imagenet2012"


def test_a_part_of_known_data_is_that_part():
    config = r50.get_config()
    config.data.train_split, config.data.eval_split = "train[:10%]", "train[90%:]"
    setup = set_up(compiled.stand_in(config))
    assert len(setup.train.source) == 128_117
    assert len(setup.test.source) == 128_117


def test_images_a_chip_take_the_place_of_the_batch_size(monkeypatch):
    monkeypatch.setattr(compiled, "of_step", lambda *_: {"memory": {}})
    found = compiled.facts(tiny.config(), LOCAL, per_chip=6, evaluation=False)
    assert found["batch_size"] == 48
    assert "eval" not in found


def test_a_teacher_is_part_of_the_step(monkeypatch):
    parts = {}

    def of_step(step, found, *_):
        step()
        parts.update(found)
        return {"memory": {}}

    monkeypatch.setattr(compiled, "of_step", of_step)
    monkeypatch.setattr(Setup, "compile", lambda setup, lowered: lowered)
    changes = {
        "distill.teacher": "cifar_resnet20",
        "distill.overrides": ConfigDict(tiny.NETWORK),
        "distill.teacher_init": "drawn",
    }
    compiled.facts(tiny.config(changes), LOCAL, evaluation=False)
    # Both are the same network.
    assert count(parts["teacher"]["params"]) == count(parts["parameters"]) > 0


def test_memory_of_what_lies_in_parts_is_that_of_a_part(monkeypatch):
    parts = {}

    def of_step(step, found, *_):
        parts.update({name: compiled._bytes(tree) for name, tree in found.items()})
        return {"memory": {}}

    monkeypatch.setattr(compiled, "of_step", of_step)
    changes = tiny.IN_PARTS | {"ema_decay": 0.9}
    compiled.facts(tiny.config(changes), LOCAL, evaluation=False)
    state = tiny.setup(changes).state_like()
    sizes = [leaf.size for leaf in jax.tree.leaves(state.params)]
    cut = sum(size for size in sizes if size >= 2**14)
    # Float32; of what is cut, each of eight devices has an eighth.
    expected = 4 * (cut // 8 + sum(sizes) - cut)
    assert parts["parameters"] == expected < 4 * sum(sizes) / 6
    assert parts["optimiser"] == expected + 4
    assert parts["average"] == expected + parts["statistics"]
    assert parts["statistics"] == 4 * count(state.batch_stats)


@pytest.mark.slow
def test_loops_hide_neither_operations_nor_bytes():
    plain, looped = (
        compiled.facts(tiny.config({"optim.microbatches": n}), LOCAL, evaluation=False)
        for n in (1, 2)
    )
    assert 0.7 < looped["train"]["flops"] / plain["train"]["flops"] < 1.6
    # Each microbatch reads the parameters and adds to their gradients.
    assert looped["train"]["bytes"] > plain["train"]["bytes"]


@pytest.mark.parametrize(
    ("changes", "train", "evaluation"),
    [
        ({}, 3, 1),
        ({"optim.sam_rho": 0.05}, 6, 1),
        ({"evaluate.views": "flip"}, 3, 2),
        ({"evaluate.views": "ten_crop"}, 3, 10),
    ],
)
def test_the_least_operations_are_those_of_all_passes(
    changes, train, evaluation, monkeypatch
):
    least = []

    def of_step(step, parts, batch, mesh, found):
        least.append(found)
        return {"memory": {}}

    monkeypatch.setattr(compiled, "of_step", of_step)
    found = compiled.facts(tiny.config(changes), LOCAL)
    forward = 2 * found["macs"] / found["devices"]
    assert least == [
        train * forward * found["batch_size"],
        evaluation * forward * found["eval_batch_size"],
    ]


def refusing(message: str):
    """A step that the compiler refuses."""

    def step():
        raise jax.errors.JaxRuntimeError(message)

    return step


@pytest.mark.parametrize(
    ("message", "wanted", "limit"),
    [
        # libtpu 0.0.52, and before it; GPUs do not tell.
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM,"
            " the total memory required for HLO temporaries (24.50G) exceeds available"
            " HBM (15.75G). HLO module: jit_train_step.",
            24.5,
            15.75,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.25G of"
            " 15.75G hbm. Exceeded hbm capacity by 1.50G.",
            17.25,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate.", 0, 0),
    ],
)
def test_out_of_memory_is_an_answer(message, wanted, limit):
    found = compiled.of_step(refusing(message), {}, {}, tiny.mesh_of(8))
    assert found.pop("seconds") >= 0
    assert found == {"wanted": wanted * 2**30, "limit": limit * 2**30}


def test_other_failures_of_a_compiler_are_not_swallowed():
    step = refusing("INTERNAL: something broke")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something broke"):
        compiled.of_step(step, {}, {}, tiny.mesh_of(8))


# What is kept.


def test_an_answer_is_asked_for_once(cache, monkeypatch):
    asked = []

    def run(command, *, input, **_):
        asked.append(input)
        return subprocess.CompletedProcess(command, 0, '{"devices": 8}\n', "")

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
    monkeypatch.setattr(ask_module, "versions", lambda: {"jax": "99"})
    names.add(key_of(request))
    monkeypatch.setattr(ask_module, "code", lambda: "other")
    names.add(key_of(request))
    assert len(names) == 6


def test_the_code_that_counts_is_what_steps_are_made_of(tmp_path, monkeypatch):
    files = {
        "resnet_jax/plan/table.py": False,
        "resnet_jax/bench/input.py": False,
        "resnet_jax/step.py": True,
        "resnet_jax/plan/hlo.py": True,
        # Its options are chosen by the chip, and stand in no config.
        "configs/compiler/v5e.py": True,
    }
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.setattr(source, "ROOT", tmp_path)
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
        return subprocess.CompletedProcess(command, 0, '{"devices": 8}\n', "")

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


@pytest.mark.parametrize("content", ["", '{"devices', "{}", "[]", None])
def test_a_damaged_answer_is_asked_for_again(cache, monkeypatch, content):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, '{"devices": 8}\n', "")

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
        return subprocess.CompletedProcess(command, 0, '{"devices": 8}\n', "")

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(pathlib.Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert ask(tiny.config(), LOCAL)["devices"] == 8
    assert "answers are not kept: there is no home" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--price=nan", "'nan' is not one or more prices above 0"),
        ("--price=-3", "'-3' is not one or more prices above 0"),
        ("--per_chip=1.5", "'1.5' is no whole number above 0"),
        ("--batch_size=", "'' is no whole number above 0"),
    ],
)
def test_numbers_that_cannot_be_are_told(flag, message, capsys, no_compiler):
    with pytest.raises(SystemExit):
        command.main(["plan", *TINY[:1], flag])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["nan", "inf", "-5", "1e-320", "0"])
def test_a_rate_that_cannot_be_is_told(rate, no_compiler):
    with pytest.raises(UserError, match=rf"--input_rate={rate} is neither a number"):
        command.main(["plan", *TINY[:1], f"--input_rate={rate}"])


def test_without_libtpu_the_way_to_it_is_told(monkeypatch, no_compiler):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-plan\.txt"):
        ask(tiny.config(), "v5e:2x4")
    assert "libtpu" in (runs.ROOT / "requirements-plan.txt").read_text()


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
    assert float(rows["calibrated by"][3]) == pytest.approx(
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
    config = r50.get_config()
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
    assert command.search(r50.get_config(), facts()) == (128, 0)
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
    table.Report(path).add("bench input", table.machine(input.BENCHMARK), rows)
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
        (("--topology=local,v5e",), "has no shape of a slice"),
        (("--batch_size=15",), "batch_size=15 cannot be divided over 8 devices"),
        (("--per_chip=3", "--config.model.bn_group_size=5"), "does not divide"),
        (("--batch_size=0",), "'0' is no whole number above 0"),
        (("--config.batch=1",), "The config has no key 'batch'. Did you mean"),
        (("--topology=local,v5e:2x4", "--price=1,2,3"), "3 prices for 2 topologies"),
        (("--topologies=local",), "What is '--topologies=local'?"),
    ],
)
def test_mistakes_get_a_sentence(arguments, message, home):
    code, output = plan(*TINY, *arguments, **home)
    assert code != 0
    assert message in output and "Traceback" not in output
