"""Several processes of one run have one result and stop together."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import time

import numpy as np
import psutil
import pytest

from resnet_jax.data.loader import permutation
from tests.helpers import pods, runs

pytestmark = pytest.mark.long

FLAGS = (
    "--config=configs/quickstart.py",
    "--config.model.overrides={'stage_sizes': (1, 1, 1)}",
    "--config.total.steps=20",
    "--config.optim.warmup.steps=5",
    # At 0.1, float32 rounding errors grow about tenfold in each step. Then even one
    # process differs by a percent from itself on other devices.
    "--config.optim.learning_rate=0.01",
    "--config.evaluate.every.steps=10",
    # Of 360 images, the second batch has some on the first process only.
    "--config.evaluate.batch_size=336",
    "--config.checkpoint.every.steps=5",
    "--config.log_every.steps=1",
)
# A run that is longer than any test waits for.
LONG = tuple(
    f"--config.{key}.steps=9000"
    for key in ("total", "evaluate.every", "checkpoint.every")
)

# Calls the program with a step that waits forever for images, or a save for the disk.
HANGING = """
import os, sys, time
from resnet_jax import main
from resnet_jax.persistence.checkpoints import Checkpoints
from resnet_jax.data.loader import Batches
before, count = Batches.__next__, 0

def hang(batches):
    global count
    count += 1
    if count == int(os.environ.get("HANGS_AT", 6)):
        print("hanging", flush=True)
        if os.environ.get("HANGS") == "save":
            Checkpoints.save = lambda *_: time.sleep(1000)
        else:
            time.sleep(1000)
    return before(batches)

Batches.__next__ = hang
sys.exit(main.main(sys.argv))
"""
# Calls the program so that it does not wait for files that a server shows late.
IMPATIENT = """
import sys
from resnet_jax import main
from resnet_jax.persistence import workdir
workdir.VISIBLE_WITHIN = 1.0
sys.exit(main.main(sys.argv))
"""
# Calls the program, and notes which images each step reads.
NOTING = """
import json, os, sys, time
from resnet_jax import main
from resnet_jax.training.experiment import Experiment
batches, place = Experiment.train_batches, Experiment.to_devices
step = None

def train_batches(experiment, first, *rest):
    global step
    step = first
    return batches(experiment, first, *rest)

def to_devices(experiment, batch):
    global step
    with open(os.environ["NOTES"], "a") as file:
        print(json.dumps([step, batch["index"].tolist()]), file=file)
    step += 1
    time.sleep(float(os.environ["PAUSE"]))
    return place(experiment, batch)

Experiment.train_batches, Experiment.to_devices = train_batches, to_devices
sys.exit(main.main(sys.argv))
"""


def launch(workdir, *flags):
    """Starts two processes of two devices each through launch/local.py."""
    return runs.start_python(
        "launch/local.py", "2", f"--workdir={workdir}", *flags, JAX_NUM_CPU_DEVICES="2"
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Returns the workdir of a run of two processes that was never interrupted."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    pods.run(2, workdir, *FLAGS)
    return workdir


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return np.array([row["train/loss"] for row in rows if "train/loss" in row])


@pytest.mark.parametrize("number", [2, 4])
def test_processes_train_as_one_does(number, two, tmp_path):
    if number == 2:
        several = two
    else:
        several = tmp_path / "several"
        pods.run(number, several, *FLAGS)
    code, output = runs.run(
        tmp_path / "one", *FLAGS, JAX_NUM_CPU_DEVICES=str(2 * number)
    )
    assert code == 0, output
    # Gloo adds up gradients in another order than one process does. Float32 rounding,
    # 6e-8, grew to 8e-7 here in 20 steps; the bounds are a few times that.
    np.testing.assert_allclose(losses(several), losses(tmp_path / "one"), rtol=2e-6)
    assert len(losses(several)) == 20
    ones, others = (runs.final_arrays(path) for path in (tmp_path / "one", several))
    for name, array in ones.items():
        scale = np.abs(array).max() + 1e-6
        assert np.abs(array - others[name]).max() <= 2e-5 * scale, name
    # Exact: the same images, the same number of right ones.
    for key in ("n_seen", "top1", "top5"):
        assert runs.result(several)[key] == runs.result(tmp_path / "one")[key]
    assert runs.result(several)["n_seen"] == 360


def test_processes_weight_classes_and_end_early_as_one_does(tmp_path):
    flags = (
        *FLAGS,
        # So few images have from 8 to 20 of each class.
        "--config.data.train_split=train[:10%]",
        "--config.data.class_weights=inverse_frequency",
        # Each evaluation reaches it.
        "--config.stop.target={'loss': 100.0}",
    )
    pods.run(2, tmp_path / "two", *flags)
    code, output = runs.run(tmp_path / "one", *flags, JAX_NUM_CPU_DEVICES="4")
    assert code == 0, output
    assert len(losses(tmp_path / "two")) == 10
    # As above.
    np.testing.assert_allclose(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-6
    )
    for name in ("one", "two"):
        result = runs.result(tmp_path / name)
        assert (result["step"], result["ended_by"]) == (10, "target")
        assert result["to_target"]["steps"] == 10


def test_processes_with_sharded_parameters_train_as_those_with_replicated_ones(
    two, tmp_path
):
    pods.run(2, tmp_path / "run", *FLAGS, "--config.sharding.params=fsdp")
    # The same sums in the same order, except for gloo's, with the bounds of above. Each
    # device now keeps its part of them.
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(two), rtol=2e-6)
    ones, others = (runs.final_arrays(path) for path in (two, tmp_path / "run"))
    for name, array in ones.items():
        scale = np.abs(array).max() + 1e-6
        assert np.abs(array - others[name]).max() <= 2e-5 * scale, name
    # One process with all parameters restores those that two processes sharded.
    code, output = runs.run(
        tmp_path / "run", *FLAGS, "--mode=eval", "--checkpoint=last"
    )
    assert code == 0, output
    evaluated = runs.read_json(tmp_path / "run" / "eval_test.json")
    for key in ("n_seen", "top1", "top5"):
        assert evaluated[key] == runs.result(two)[key]


def test_two_processes_evaluate_the_classes_as_one_does(two, tmp_path):
    flags = (*FLAGS, "--mode=eval", "--checkpoint=last")
    results = []
    for number in (2, 1):
        workdir = tmp_path / str(number)
        shutil.copytree(two, workdir)
        pods.run(number, workdir, *flags)
        evaluated = runs.read_json(workdir / "eval_test.json")
        rows = (workdir / "eval_test.csv").read_text().splitlines()
        results.append((evaluated, [row.split(",")[:3] for row in rows]))
    (ones, own_rows), (others, other_rows) = results
    for key in ("top1", "top1_interval", "macro", "per_class", "confusion"):
        assert ones[key] == others[key], key
    assert own_rows == other_rows


def test_other_numbers_of_processes_and_devices_resume_with_the_same_images(tmp_path):
    """Runs on 2 processes of 4 devices, 1 of 1 and 4 of 1, and stops the first two."""
    flags = (*FLAGS, "--config.total.steps=60")
    for number, devices, until in ((2, 4, 8), (1, 1, 30), (4, 1, 60)):
        # JAX looks for a signal once a second, and must notice it before the end.
        pause = "0.3" if until < 60 else "0"
        environments = {
            i: {"NOTES": str(tmp_path / f"{number} processes, {i}"), "PAUSE": pause}
            for i in range(number)
        }
        processes = pods.start(
            number,
            tmp_path / "run",
            *flags,
            devices=devices,
            main=("-c", NOTING),
            environments=environments,
        )
        if until < 60:
            pods.wait_for(processes[0], f"step {until}/")
            processes[-1].send_signal(signal.SIGTERM)
        ends = pods.finish(processes)
        expected = 143 if until < 60 else 0
        assert [code for code, _ in ends] == [expected] * number, ends
    by_step: dict[int, list[int]] = {}
    for file in tmp_path.glob("* processes*"):
        for line in file.read_text().splitlines():
            step, indices = json.loads(line)
            by_step.setdefault(step, []).extend(indices)
    assert sorted(by_step) == list(range(60))
    # The order of a batch's rows follows the devices, so it is not compared.
    order = np.concatenate([permutation(0, epoch, 1437) for epoch in range(3)])
    for step, indices in by_step.items():
        expected = order[64 * step : 64 * (step + 1)]
        assert sorted(indices) == sorted(expected.tolist()), step
    assert runs.result(tmp_path / "run")["n_seen"] == 360


# Steps take milliseconds, so processes that did not agree would differ in one of four
# attempts.
@pytest.mark.parametrize("attempt", range(6))
def test_sigterm_stops_all_processes_at_the_same_step(attempt, tmp_path):
    process = launch(tmp_path / "run", *FLAGS, *LONG)
    code, output = runs.send_when(process, f"step {6 + attempt}/", signal.SIGTERM)
    assert code == 143, output
    saved = re.findall(r"saved step (\d+);", output)
    assert saved and runs.checkpoint_steps(tmp_path / "run")[-1] == int(saved[0])


# Slurm signals the workers of a task too.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_group_of_one_process_saves_one_step_on_all(
    number, two, tmp_path
):
    flags = (*FLAGS, "--config.data.num_workers=1", "--config.data.cache=none")
    processes = pods.start(2, tmp_path / "run", *flags, own_group=True)
    pods.wait_for(processes[0], "step 8/")
    os.killpg(processes[1].pid, number)
    ends = pods.finish(processes)
    assert [code for code, _ in ends] == [143, 143], ends
    saved = re.findall(r"saved step (\d+);", ends[0][1])
    assert saved and runs.checkpoint_steps(tmp_path / "run")[-1] == int(saved[0])
    assert not any("Traceback" in output for _, output in ends)
    pods.run(2, tmp_path / "run", *flags)
    runs.assert_same_end(tmp_path / "run", two)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_all_processes_with_nothing_saved(
    number, tmp_path
):
    fresh = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "nothing compiled yet")}
    processes = pods.start(
        2, tmp_path / "run", *FLAGS, environments=dict.fromkeys(range(2), fresh)
    )
    # JAX reports it after a second or two, and the first step takes longer.
    pods.wait_for(processes[0], "workdir:")
    processes[1].send_signal(number)
    ends = pods.finish(processes)
    assert [code for code, _ in ends] == [143, 143], ends
    assert all(x.splitlines()[-1] == "stopped by SIGTERM" for _, x in ends), ends
    assert runs.checkpoint_steps(tmp_path / "run") == []
    assert not (tmp_path / "run" / "running.json").exists()


def test_killed_workers_before_a_signal_end_all_processes_by_that_signal(two, tmp_path):
    flags = (*FLAGS, "--config.data.num_workers=1", "--config.data.cache=none")
    processes = pods.start(2, tmp_path / "run", *flags)
    pods.wait_for(processes[0], "step 8/")
    for worker in runs.workers_of(processes[1]):
        worker.kill()
    time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    ends = pods.finish(processes)
    assert [code for code, _ in ends] == [143, 143], ends
    pods.run(2, tmp_path / "run", *flags)
    runs.assert_same_end(tmp_path / "run", two)


# Process 0 waits for process 1, and process 1 for the coordinator.
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_waits_for_the_others_ends_with_a_signal(index, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    process = runs.start(
        tmp_path / "run",
        *(*FLAGS, f"--coordinator=localhost:{port}", "--num_processes=2"),
        f"--process_id={index}",
    )
    # The process waits as soon as it has a thread of the client.
    status = pathlib.Path(f"/proc/{process.pid}/task")
    while not any(
        "grpc" in (task / "comm").read_text() for task in list(status.iterdir())
    ):
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    code, output = runs.finish(process, 30)
    assert (code, output) == (143, "stopped by SIGTERM\n")


@pytest.mark.parametrize("stopped", [False, True])
def test_a_dry_run_of_several_processes_leaves_nothing(stopped, tmp_path):
    process = launch(tmp_path / "run", *FLAGS, "--mode=dry_run")
    number = signal.SIGTERM if stopped else signal.SIGCONT
    code, output = runs.send_when(process, r"\] compiling", number)
    assert code == (143 if stopped else 0), output
    assert ("all is well" in output) != stopped
    assert not list(tmp_path.iterdir())


def test_a_dry_run_that_is_ended_within_the_grace_leaves_nothing(tmp_path):
    processes = pods.start(
        2,
        tmp_path / "run",
        *(*FLAGS, "--mode=dry_run", "--grace=4s"),
        main=("-c", HANGING),
        environments={i: {"HANGS_AT": "2"} for i in range(2)},
    )
    pods.wait_for(processes[0], "hanging")
    processes[-1].send_signal(signal.SIGTERM)
    ends = pods.finish(processes)
    assert [code for code, _ in ends] == [143, 143], ends
    assert not list(tmp_path.iterdir())


# Process 0 runs JAX's coordination service. When it dies, JAX aborts the others; when
# another process dies, the collectives of the others fail.
@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_is_killed_the_others_stop_and_a_restart_ends_the_same(
    killed, two, tmp_path
):
    flags = (*FLAGS, "--config.data.num_workers=1", "--config.data.cache=none")
    processes = pods.start(2, tmp_path / "run", *flags)
    pods.wait_for(processes[0], "step 8/")
    children = [
        child
        for process in processes
        for child in psutil.Process(process.pid).children(recursive=True)
    ]
    assert len(children) >= 2
    processes[killed].kill()
    before = time.monotonic()
    ends = pods.finish(processes, timeout=60)
    assert time.monotonic() - before < 60
    assert ends[killed][0] == -signal.SIGKILL
    code, output = ends[1 - killed]
    assert code == 1, output
    (error,) = pods.errors(output)
    assert f"process {1 - killed} (host" in error
    assert "The same command resumes from the last checkpoint" in error
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    pods.run(2, tmp_path / "run", *flags)
    runs.assert_same_end(tmp_path / "run", two)


def test_a_process_that_hangs_is_noticed_and_the_others_stop(tmp_path):
    processes = pods.start(2, tmp_path / "run", *FLAGS, *LONG)
    pods.wait_for(processes[0], "step 3/")
    processes[1].send_signal(signal.SIGSTOP)
    code, output = runs.finish(processes[0], timeout=60)
    processes[1].kill()
    assert code == 1, output
    assert "another one died" in pods.errors(output)[0]


@pytest.mark.parametrize(("number", "hangs"), [(1, "batch"), (2, "batch"), (1, "save")])
def test_a_run_that_hangs_after_a_signal_ends_within_the_grace(number, hangs, tmp_path):
    flags = (*FLAGS, "--config.checkpoint.every.steps=2", "--grace=4s")
    processes = pods.start(
        number,
        tmp_path / "run",
        *flags,
        "--config.total.steps=9000",
        main=("-c", HANGING),
        environments={i: {"HANGS": hangs} for i in range(number)},
    )
    pods.wait_for(processes[0], "hanging")
    time.sleep(1)
    processes[-1].send_signal(signal.SIGTERM)
    before = time.monotonic()
    ends = pods.finish(processes)
    # One more second for other programs of the machine.
    assert time.monotonic() - before < 5
    assert [code for code, _ in ends] == [143] * number, ends
    for _, output in ends:
        (error,) = pods.errors(output)
        assert "within --grace=4s of SIGTERM" in error
        assert "the last checkpoint is that of step 4" in error


def test_a_second_ctrl_c_ends_a_run_whose_save_hangs(tmp_path):
    flags = (*FLAGS, "--config.total.steps=9000")
    process = runs.start_python(
        *("-c", HANGING, f"--workdir={tmp_path / 'run'}", *flags), HANGS="save"
    )
    pods.wait_for(process, "hanging")
    for _ in range(2):
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
    code, output = runs.finish(process, 20)
    assert code == 130, output
    (error,) = pods.errors(output)
    assert "a second Ctrl-C ended the run at once; the last checkpoint is" in error
    assert not (tmp_path / "run" / "running.json").exists()


def test_a_run_that_stalls_prints_where_it_is_and_stops(tmp_path):
    flags = (*FLAGS, "--stall_timeout=60s")
    processes = pods.start(2, tmp_path / "run", *flags, main=("-c", HANGING))
    ends = pods.finish(processes)
    assert [code for code, _ in ends] == [1, 1], ends
    for _, output in ends:
        (error,) = pods.errors(output)
        assert "no step ended for --stall_timeout=60s" in error
        assert "that of step 5" in error
        # The stack of the thread that hangs.
        assert "in hang" in output


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"flags": ["--config.seed=4"]}, "differ in config.seed: process 0 (host"),
        ({"flags": ["--num_processes=3"]}, "differ in the number of processes"),
        ({"flags": ["--coordinator=localhost:9"]}, "within 5 s. Check that all"),
        (
            {"flags": ["--workdir={}/elsewhere"], "main": ("-c", IMPATIENT)},
            "storage that all processes share",
        ),
        ({"environment": {"JAX_NUM_CPU_DEVICES": "1"}}, "differ in their devices"),
    ],
)
def test_a_wrong_start_is_one_sentence_in_each_log(changes, text, tmp_path):
    flags = [flag.format(tmp_path) for flag in changes.get("flags", [])]
    # Long enough for two imports of jax on a busy machine, and short where it ends.
    timeout = "5s" if "localhost:9" in "".join(flags) else "60s"
    before = time.monotonic()
    ends = pods.finish(
        pods.start(
            2,
            tmp_path / "run",
            *FLAGS,
            f"--initialization_timeout={timeout}",
            extra_flags={1: flags},
            environments={1: changes.get("environment", {})},
            main=changes.get("main", pods.MAIN),
        )
    )
    assert time.monotonic() - before < 120
    assert [code for code, _ in ends] == [1, 1], ends
    for _, output in ends:
        (error,) = pods.errors(output)
        assert text in error
        assert "Traceback" not in output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_run_in_a_workdir_stops_and_the_first_continues(tmp_path):
    first = runs.start(tmp_path / "run", *FLAGS, *LONG)
    pods.wait_for(first, "step 2/")
    code, output = runs.run(tmp_path / "run", *FLAGS, *LONG)
    assert code == 1
    (error,) = pods.errors(output)
    assert re.search(rf"in use by a run on host \S+, pid {first.pid};", error)
    assert first.poll() is None
    pods.wait_for(first, "step 5")
    first.send_signal(signal.SIGTERM)
    assert runs.finish(first)[0] == 143
    assert not (tmp_path / "run" / "running.json").exists()


@pytest.mark.parametrize(("number", "change"), [(1, "renamed"), (2, "removed")])
def test_a_run_whose_workdir_is_gone_stops_and_the_same_command_works(
    tmp_path, number, change
):
    workdir = tmp_path / "run"
    processes = pods.start(number, workdir, *FLAGS, *LONG)
    pods.wait_for(processes[0], "step 2/")
    if change == "removed":
        shutil.rmtree(workdir)
    else:
        workdir.rename(tmp_path / "elsewhere")
    for code, text in pods.finish(processes, timeout=60):
        assert code == 1
        (error,) = pods.errors(text)
        assert f"{workdir} was removed, moved or replaced while this run used" in error
        assert "Traceback" not in text
    assert not workdir.exists()
    if change == "renamed":
        (tmp_path / "elsewhere").rename(workdir)
    pods.run(number, workdir, *FLAGS)
    assert not (workdir / "running.json").exists()


def test_processes_hold_out_and_balance_the_same_images_as_one_does(tmp_path):
    flags = (
        *FLAGS,
        "--config.data.train_split=train+test",
        "--config.data.eval_split=",
        "--config.data.balance",
    )
    pods.run(2, tmp_path / "two", *flags)
    code, output = runs.run(tmp_path / "one", *flags, JAX_NUM_CPU_DEVICES="4")
    assert code == 0, output
    # The bound of `test_processes_train_as_one_does`.
    np.testing.assert_allclose(
        losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=2e-6
    )
    tables = [(tmp_path / name / "split.csv").read_bytes() for name in ("one", "two")]
    assert tables[0] == tables[1]
    assert runs.result(tmp_path / "two")["n_seen"] == 359
