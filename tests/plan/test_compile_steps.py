"""Tests of compiling the steps of a plan, and of the figures that follow."""

import jax
import pytest
from ml_collections import ConfigDict

from resnet_jax.compiler.chips import LOCAL
from resnet_jax.config import load
from resnet_jax.errors import UserError
from resnet_jax.models.cost import count
from resnet_jax.plan import compile_steps
from resnet_jax.plan.estimate import total
from resnet_jax.training import programs
from resnet_jax.training.experiment import set_up
from tests.helpers import tiny


@pytest.fixture(scope="module")
def planned() -> dict:
    """Returns the figures of the tiny run with EMA on this machine."""
    return compile_steps.facts(tiny.config({"ema_decay": 0.9}), LOCAL)


@pytest.mark.slow
def test_plan_compiles_the_steps_that_training_runs(planned):
    setup = tiny.setup({"ema_decay": 0.9})
    stats = programs.compile_train_step(setup).memory_analysis()
    # XLA counts arguments, results that do not alias arguments, temporaries and code.
    assert total(planned["train"]["memory"]) == (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes
    )
    stats = programs.compile_eval_step(setup).memory_analysis()
    assert planned["eval"]["memory"]["activations"] == stats.temp_size_in_bytes


def test_memory_is_divided_into_parts(planned):
    memory, params = planned["train"]["memory"], planned["params"]
    assert memory["parameters"] == 4 * params
    # The optimizer has a momentum for each parameter, and the number of steps.
    assert memory["optimiser"] == 4 * params + 4
    assert memory["average"] == memory["parameters"] + memory["statistics"]
    # Each device has two grey images of 8x8 pixels, and their labels.
    assert memory["batch"] == 2 * (8 * 8 + 4)
    assert memory["activations"] > 0


def test_the_figures_describe_the_run(planned):
    expected = {"batch_size": 16, "devices": 8, "chips": 8, "hosts": 1, "steps": 4}
    expected |= {"train_images": 64, "eval_images": 64, "evaluations": 1, "chip": ""}
    assert planned | expected == planned
    sizes = [each["bytes"] for each in planned["train"]["collectives"]]
    # Collectives sum gradients, running statistics and two metrics, in float32.
    statistics = planned["train"]["memory"]["statistics"]
    assert sum(sizes) == 4 * planned["params"] + statistics + 2 * 4


def test_known_data_sets_need_not_be_on_disk():
    config = load("configs/r50.py")
    setup = set_up(compile_steps.stand_in(config))
    assert len(setup.train.source) == 1_281_167
    assert len(setup.eval.source) == 50_000
    assert setup.model.spec.num_classes == 1000
    # There are 90 epochs of 1251.1 steps.
    assert setup.total_steps == 112_603
    # The caller's config is not changed.
    assert config.data.source == "tfds:imagenet2012"


def test_a_part_of_a_known_split_has_the_size_of_that_part():
    config = load("configs/r50.py")
    config.data.train_split, config.data.eval_split = "train[:10%]", "train[90%:]"
    setup = set_up(compile_steps.stand_in(config))
    assert len(setup.train.source) == 128_117
    assert len(setup.eval.source) == 128_117


def test_images_per_chip_determine_the_batch_size(monkeypatch):
    monkeypatch.setattr(compile_steps, "figures_of_step", lambda *_: {"memory": {}})
    figures = compile_steps.facts(tiny.config(), LOCAL, per_chip=6, evaluation=False)
    assert figures["batch_size"] == 48
    assert "eval" not in figures


def test_the_step_includes_a_teacher(monkeypatch):
    parts = {}

    def figures_of_step(step, trees, *_):
        step()
        parts.update(trees)
        return {"memory": {}}

    monkeypatch.setattr(compile_steps, "figures_of_step", figures_of_step)
    monkeypatch.setattr(programs, "compile_lowered", lambda _, lowered: lowered)
    changes = {
        "distill.teacher": "cifar_resnet20",
        "distill.overrides": ConfigDict(tiny.NETWORK),
        "distill.teacher_init": "drawn",
    }
    compile_steps.facts(tiny.config(changes), LOCAL, evaluation=False)
    # Teacher and student are the same network.
    assert count(parts["teacher"]["params"]) == count(parts["parameters"]) > 0


def test_sharded_parameters_count_as_the_shard_of_a_device(monkeypatch):
    parts = {}

    def figures_of_step(step, trees, *_):
        parts.update({name: compile_steps._bytes(tree) for name, tree in trees.items()})
        return {"memory": {}}

    monkeypatch.setattr(compile_steps, "figures_of_step", figures_of_step)
    changes = tiny.IN_PARTS | {"ema_decay": 0.9}
    compile_steps.facts(tiny.config(changes), LOCAL, evaluation=False)
    state = programs.state_like(tiny.setup(changes))
    sizes = [leaf.size for leaf in jax.tree.leaves(state.params)]
    sharded = sum(size for size in sizes if size >= 2**14)
    # All are float32. Each of eight devices holds an eighth of the sharded parameters.
    expected = 4 * (sharded // 8 + sum(sizes) - sharded)
    assert parts["parameters"] == expected < 4 * sum(sizes) / 6
    assert parts["optimiser"] == expected + 4
    assert parts["average"] == expected + parts["statistics"]
    assert parts["statistics"] == 4 * count(state.batch_stats)


@pytest.mark.slow
def test_operations_and_bytes_inside_loops_are_counted():
    plain, looped = (
        compile_steps.facts(
            tiny.config({"optim.microbatches": n}), LOCAL, evaluation=False
        )
        for n in (1, 2)
    )
    assert 0.7 < looped["train"]["flops"] / plain["train"]["flops"] < 1.6
    # Each microbatch reads the parameters, and adds to their gradients.
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
def test_the_minimum_of_operations_counts_all_passes(
    changes, train, evaluation, monkeypatch
):
    minimums = []

    def figures_of_step(step, parts, batch, mesh, least):
        minimums.append(least)
        return {"memory": {}}

    monkeypatch.setattr(compile_steps, "figures_of_step", figures_of_step)
    figures = compile_steps.facts(tiny.config(changes), LOCAL)
    forward = 2 * figures["macs"] / figures["devices"]
    assert minimums == [
        train * forward * figures["batch_size"],
        evaluation * forward * figures["eval_batch_size"],
    ]


def refusing(message: str):
    """Returns a function that fails like a compiler that refuses a step."""

    def step():
        raise jax.errors.JaxRuntimeError(message)

    return step


@pytest.mark.parametrize(
    ("message", "wanted", "limit"),
    [
        # The first is the message of libtpu 0.0.52, the second of earlier versions.
        # Compilers for GPUs do not give the amounts.
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
def test_a_step_that_does_not_fit_has_figures(message, wanted, limit):
    figures = compile_steps.figures_of_step(refusing(message), {}, {}, tiny.mesh_of(8))
    assert figures.pop("seconds") >= 0
    assert figures == {"wanted": wanted * 2**30, "limit": limit * 2**30}


class UnreadableProgram:
    """A compiled program whose text has a form that `hlo` cannot read."""

    def __init__(self):
        self._compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
        self.memory_analysis = self._compiled.memory_analysis
        self.cost_analysis = self._compiled.cost_analysis

    def as_text(self) -> str:
        return (
            "ENTRY %main (x: f32[4]) -> f32[4] {\n"
            "  %x = f32[4]{0} parameter(0)\n"
            "  ROOT %sum = f32[4]{0} all-reduce(%x), replica_groups=everyone\n"
            "}\n"
        )


def test_a_program_that_cannot_be_read_is_reported():
    with pytest.raises(UserError, match=r"cannot read .*replica_groups=everyone"):
        compile_steps.figures_of_step(UnreadableProgram, {}, {}, tiny.mesh_of(8))


def test_other_failures_of_a_compiler_are_raised():
    step = refusing("INTERNAL: something broke")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something broke"):
        compile_steps.figures_of_step(step, {}, {}, tiny.mesh_of(8))
