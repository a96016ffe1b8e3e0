"""Each mistake of a user gets one sentence and the exit code 1, and loses nothing."""

import signal

import pytest

from tests.helpers import runs

QUICK = "--config=configs/quickstart.py"


def test_each_mistake_gets_one_sentence_with_a_remedy(tmp_path):
    """One process calls `main` for all cases, and clears the flags between them."""
    script = """
import sys
from absl import flags
from resnet_jax import main
for line in open(sys.argv[1]).read().splitlines():
    flags.FLAGS.unparse_flags()
    print(">>>", main.main(["main", *line.split("\\t")]), flush=True)
"""
    empty = tmp_path / "empty" / "train" / "cat"
    empty.mkdir(parents=True)
    (tmp_path / "empty" / "validation" / "cat").mkdir(parents=True)
    lone = tmp_path / "lone"
    for split, name in (("train", "cat"), ("train", "dog"), ("validation", "cat")):
        (lone / split / name).mkdir(parents=True)
        (lone / split / name / "a.png").write_bytes(b"")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "result.json").write_text("mine")
    work = f"--workdir={tmp_path / 'work'}"
    folder = "--config.data.source=folder:"
    splits = "--config.data.eval_split=validation"
    cases = [
        ([work], "--config=configs/quickstart.py"),
        ([work, "--config.total.steps=3"], "--config=configs/quickstart.py"),
        ([QUICK], "--workdir=runs/NAME"),
        (["--config=configs/quickstrat.py", work], "configs/quickstart.py"),
        ([QUICK, work, "--mod=eval"], "mode"),
        ([QUICK, work, "--mode=evla"], "eval"),
        ([QUICK, work, "eval"], "--name=value"),
        ([QUICK, work, "--config.optim.learning_rat=1"], "optim.learning_rate"),
        ([QUICK, work, "--config.batch_size=many"], "many"),
        ([QUICK, work, "--config.model.name=cifar_resnet21"], "cifar_resnet20"),
        ([QUICK, work, "--config.model.overrides={'wdths': 1}"], "widths"),
        ([QUICK, work, "--config.model.dtype=bfloat"], "bfloat16"),
        ([QUICK, work, "--config.data.source=digit"], "digits"),
        ([QUICK, work, "--config.data.source=tfds:minst"], "mnist"),
        ([QUICK, work, "--config.data.eval_split=tst"], "test"),
        ([QUICK, work, "--config.batch_size=60"], "56 or 64"),
        ([QUICK, work, "--config.batch_size=0"], "batch_size=0 must be at least 1"),
        ([QUICK, work, "--config.data.image_size=-3"], "must be at least 0"),
        ([QUICK, work, "--config.optim.learning_rate=-1"], "must be at least 0"),
        ([QUICK, work, "--config.total=3"], "--config.total.epochs=NUMBER"),
        ([QUICK, work, "--lr=1"], "--config.KEY=VALUE sets a key"),
        ([QUICK, work, "--config.model.bn_group_size=30"], "16 or 32"),
        ([QUICK, work, "--config.model.bn_group_size=world"], "'global'"),
        ([QUICK, work, "--config.optim.microbatches=3"], "2 or 4"),
        ([QUICK, work, "--config.optim.schedule=cosin"], "cosine"),
        ([QUICK, work, "--config.optim.weight_decay_exclude=bn"], "norm"),
        ([QUICK, work, "--config.data.train_crop=random"], "random_resized"),
        ([QUICK, work, "--config.data.policy=trivial"], "trivial_wide"),
        ([QUICK, work, "--config.data.lighting=0.1"], "data.channels=1"),
        ([QUICK, work, "--config.data.on_bad_image=ignore"], "skip"),
        ([QUICK, work, "--config.data.channels=2"], "1 (grey) or 3 (RGB)"),
        ([QUICK, work, "--config.data.mean=(0.5,0.5)"], "data.channels=1"),
        ([QUICK, work, "--config.total.steps=2"], "optim.warmup"),
        ([QUICK, work, "--grace=soon"], "not a time, such as 25s or 30m"),
        ([QUICK, work, "--grace=-1"], "not a time, such as 25s or 30m"),
        ([QUICK, work, "--stall_timeout=nan"], "not a time, such as 25s or 30m"),
        ([QUICK, work, "--coordinator=host:1"], "--num_processes=N"),
        ([QUICK, work, "--num_processes=2"], "--num_processes needs --coordinator"),
        ([QUICK, work, "--process_id=1"], "--process_id needs --coordinator"),
        ([QUICK, work, "--num_processes=0"], "not a whole number above 0"),
        ([QUICK, work, "--process_id=-1"], "not a whole number of at least 0"),
        ([QUICK, work, "--mode="], "--mode is empty; is a variable unset?"),
        ([QUICK, work, "--flagfile=/bin/sh"], "--flagfile names is not a text"),
        ([QUICK, "--workdir="], "--workdir is empty; is a variable unset?"),
        ([QUICK, "--workdir", " "], "--workdir is empty; is a variable unset?"),
        ([QUICK, "--workdir=/proc/x"], "/proc/x cannot be written: "),
        ([QUICK, f"--workdir={taken}/result.json"], "exists and is not one"),
        ([QUICK, f"--workdir={taken}/result.json/x"], "Not a directory"),
        ([QUICK, f"--workdir={tmp_path}/{'n' * 300}"], "File name too long"),
        ([QUICK, "--workdir=~no_such_user/x"], "~no_such_user is not known"),
        ([QUICK, "--workdir=gs:/bucket/x"], "write gs://bucket/x"),
        ([QUICK, work, "--distributed"], "no TPU pod, Slurm or Open MPI"),
        ([QUICK, work, "--config.total.epochs=0"], "config.total"),
        (
            [
                QUICK,
                work,
                "--config.data.source=tfds:mnist",
                f"--config.data.data_dir={tmp_path}",
            ],
            f"python -m resnet_jax.prepare tfds:mnist --data_dir={tmp_path}",
        ),
        ([QUICK, work, f"{folder}{tmp_path / 'nowhere'}", splits], "nowhere"),
        ([QUICK, work, f"{folder}{tmp_path / 'empty'}", splits], "holds no images"),
        ([QUICK, work, f"{folder}{lone}", splits], "'dog'"),
        (
            [QUICK, work, f"{folder}{lone}", "--config.data.eval_split=valid"],
            "validation",
        ),
        ([QUICK, work, "--mode=eval"], "holds no run"),
        ([QUICK, f"--workdir={taken}"], "another --workdir"),
    ]
    (tmp_path / "cases").write_text("\n".join("\t".join(flags) for flags, _ in cases))
    (tmp_path / "script.py").write_text(script)
    code, output = runs.run_python(
        str(tmp_path / "script.py"), str(tmp_path / "cases"), JAX_NUM_CPU_DEVICES="8"
    )
    assert code == 0, output
    answers = output.split(">>> ")
    # The exit code of a case follows its output.
    for i, (flags, expected) in enumerate(cases):
        said = answers[i].partition("\n")[2] if i else answers[0]
        lines = [line for line in said.splitlines() if line]
        assert lines[-1].startswith("error: "), (flags, said)
        assert expected in lines[-1], (flags, lines[-1])
        assert "Traceback" not in said, (flags, said)
        assert answers[i + 1].startswith("1\n"), flags
    assert not (tmp_path / "work").exists()
    assert (taken / "result.json").read_text() == "mine"


def test_flags_without_an_effect_are_warnings(tmp_path):
    code, output = runs.run(
        tmp_path / "w",
        *(QUICK, "--checkpoint=last", "--initialization_timeout=5m", "--grace=1s"),
        *("--grace=2s", "--config.data.source=folder:/no/such/folder"),
    )
    assert code == 1
    assert output.splitlines() == [
        "warning: --grace is given more than once; the last one counts: 2s",
        "warning: --initialization_timeout has an effect only with --coordinator or"
        " --distributed.",
        "warning: --checkpoint has an effect only with --mode=eval.",
        "error: There is no folder /no/such/folder.",
    ]


@pytest.mark.slow
def test_a_workdir_in_the_home_directory_is_written_there(tmp_path):
    flags = (*runs.SMALL, "--config.total.steps=1", "--config.optim.warmup.steps=0")
    code, output = runs.run_python(
        *("-m", "resnet_jax.main", "--workdir=~/runs/1", *flags), HOME=str(tmp_path)
    )
    assert code == 0, output
    assert runs.result(tmp_path / "runs" / "1")
    assert not (runs.ROOT / "~").exists()


@pytest.mark.slow
def test_a_workdir_of_another_config_is_not_changed(tmp_path):
    flags = (*runs.SMALL, "--config.total.steps=12")
    assert runs.run(tmp_path / "run", *flags)[0] == 0
    before = sorted((tmp_path / "run").rglob("*"))
    code, output = runs.run(tmp_path / "run", *flags, "--config.seed=3")
    assert code == 1
    assert "seed: 0 -> 3" in output.splitlines()[-1]
    assert sorted((tmp_path / "run").rglob("*")) == before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    flags = ("--config.optim.learning_rate=1e20", "--config.optim.warmup.steps=0")
    code, output = runs.run(tmp_path / "run", *runs.SMALL, *flags)
    assert code == 1
    last = output.splitlines()[-1]
    assert last.startswith("error: The loss is not finite at step ")
    assert "optim.learning_rate" in last
    assert "Traceback" not in output


@pytest.mark.slow
def test_images_that_do_not_fit_into_the_host_are_one_sentence(tmp_path):
    flags = (*runs.SMALL, "--config.data.image_size=32000")
    code, output = runs.run(tmp_path / "run", *flags)
    assert code == 1
    last = output.splitlines()[-1]
    assert last.startswith("error: This host has too little memory for this run: 64 ")
    assert "batch_size" in last and "data.image_size" in last
    assert "Traceback" not in output


@pytest.mark.slow
def test_too_little_memory_of_a_device_is_one_sentence(tmp_path):
    # One kernel of the last block would take 36 TB.
    wide = {"stage_sizes": (1, 1, 1), "widths": (16, 32, 1_000_000)}
    flags = (*runs.SMALL, f"--config.model.overrides={wide}")
    code, output = runs.run(tmp_path / "run", *flags)
    assert code == 1
    last = output.splitlines()[-1]
    assert last.startswith("error: A device has too little memory for this run (")
    assert "batch_size" in last and "resnet_jax.plan --largest" in last
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("platforms", ["rocm", "abacus"])
def test_a_platform_that_does_not_exist_is_one_sentence(tmp_path, platforms):
    code, output = runs.run(tmp_path / "work", QUICK, JAX_PLATFORMS=platforms)
    *_, last = output.splitlines()
    assert code == 1, output
    named = f"JAX_PLATFORMS={platforms}"
    assert last.startswith(f"error: JAX can use no devices of {named} (")
    assert "Traceback" not in output
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint(tmp_path):
    process = runs.start(tmp_path / "run", *runs.SMALL)
    code, output = runs.send_when(process, r"step 6/", signal.SIGINT)
    assert code == 128 + signal.SIGINT, output
    assert runs.checkpoint_steps(tmp_path / "run")[-1] >= 6


def test_an_error_in_the_program_keeps_its_traceback(tmp_path):
    program = (
        "import sys, resnet_jax.training.loop as loop;"
        " loop.train = lambda *_, **__: 1 / 0;"
        " from resnet_jax import main; sys.exit(main.main(sys.argv))"
    )
    code, output = runs.run_python("-c", program, QUICK, f"--workdir={tmp_path / 'w'}")
    assert code == 1
    assert "ZeroDivisionError" in output and "Traceback" in output


def test_the_warning_for_an_error_without_a_message_names_its_type():
    code, output = runs.run_python(
        "-c",
        """
from resnet_jax.console.quiet import quiet_libraries
quiet_libraries()
class Broken:
    def __init__(self, *words):
        self.words = words
    def __del__(self):
        raise OSError(*self.words)
Broken()
Broken("The disk is full.")
""",
    )
    assert (code, output) == (0, "warning: OSError\nwarning: The disk is full.\n")
