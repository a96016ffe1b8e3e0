"""launch/slurm.sbatch on a real Slurm, with two nodes on this machine."""

import os
import re
import subprocess
import sys
import time

import pytest

from tests.helpers import runs
from tests.helpers.slurm_cluster import NoSlurmError, cluster

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm():
    try:
        with cluster() as started:
            yield started
    except NoSlurmError as reason:
        pytest.skip(str(reason))


def submit(slurm, directory, *arguments, python=sys.executable, nodes=2):
    """Submits launch/slurm.sbatch; returns the job's number and the path of its log."""
    directory.mkdir(exist_ok=True)
    slurm.environment |= {
        "PYTHON": str(python),
        "JAX_NUM_CPU_DEVICES": "2",
    }
    log = directory / "log"
    options = (f"--nodes={nodes}", f"--output={log}", "--parsable")
    script = "launch/slurm.sbatch"
    number = slurm.run("sbatch", *options, script, *arguments, cwd=runs.ROOT)
    return number.strip(), log


def wait_for(condition, seconds, log):
    """Waits until a condition holds; fails with the log of the job."""
    end = time.monotonic() + seconds
    while not condition():
        text = log.read_text() if log.exists() else "(no log)"
        assert time.monotonic() < end, text
        time.sleep(0.2)


def end_of(slurm, number, log, seconds=60):
    """Waits until a job has ended; returns its fields."""
    wait_for(lambda: slurm.job(number)["JobState"] in ENDED, seconds, log)
    return slurm.job(number)


def stand_in(tmp_path, body):
    """Makes a program to run instead of Python; `$0.started` counts its starts."""
    path = tmp_path / "program"
    path.write_text(f'#!/bin/bash\necho >> "$0.started"\n{body}\n')
    path.chmod(0o755)
    return path


@pytest.mark.long
def test_a_job_that_got_sigterm_is_queued_again_and_completes_its_run(slurm, tmp_path):
    workdir = tmp_path / "run"
    # The run saves only at its end and on SIGTERM, so it resumes from the latter.
    flags = (*runs.SMALL, "--config.checkpoint.every.steps=1000")
    number, log = submit(slurm, tmp_path, f"--workdir={workdir}", *flags)
    wait_for(lambda: log.exists() and "step 8/" in log.read_text(), 120, log)
    slurm.run("scancel", "--signal=TERM", number)
    job = end_of(slurm, number, log, 180)
    text = log.read_text()
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), text
    (saved,) = re.findall(r"saved step (\d+);", text)
    assert f"resuming from the checkpoint of step {saved}" in text
    # Both processes took part and stopped: srun reports each exit code that is not 0.
    assert text.count("Exited with exit code 143") == 2
    assert runs.result(workdir)["step"] == 40


@pytest.mark.slow
def test_a_run_stopped_by_sigterm_is_queued_again_with_the_same_arguments(
    slurm, tmp_path
):
    program = stand_in(
        tmp_path,
        'echo "arguments: $*"; (( $(wc -l < "$0.started") > 1 )) || exit 143',
    )
    number, log = submit(slurm, tmp_path, "--a", "b c", python=program, nodes=1)
    job = end_of(slurm, number, log)
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "1"), log.read_text()
    line = "0: arguments: -u -m resnet_jax.main --distributed --a b c\n"
    assert log.read_text().count(line) == 2


def test_a_run_that_failed_is_not_queued_again(slurm, tmp_path):
    program = stand_in(tmp_path, "exit 3")
    number, log = submit(slurm, tmp_path, python=program, nodes=1)
    job = end_of(slurm, number, log)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "3:0"), log.read_text()
    assert job["Restarts"] == "0"


def test_scancel_ends_a_run_for_good(slurm, tmp_path):
    # Like a run, the program saves and then exits with 143.
    program = stand_in(
        tmp_path, "trap 'sleep 1; exit 143' TERM; echo up; sleep 60 & wait"
    )
    number, log = submit(slurm, tmp_path, python=program, nodes=1)
    wait_for(lambda: log.exists() and "up" in log.read_text(), 20, log)
    slurm.run("scancel", number)
    job = end_of(slurm, number, log)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), log.read_text()


# The tests of GPUs need no Slurm, which describes them in environment variables.


def devices_of_tasks(directory, **variables):
    """Runs the script with an srun that prints the GPUs that JAX would take."""
    srun = directory / "srun"
    srun.write_text('#!/bin/sh\necho "GPUs: ${JAX_LOCAL_DEVICE_IDS-by task}"\n')
    srun.chmod(0o755)
    done = subprocess.run(
        ["bash", runs.ROOT / "launch/slurm.sbatch"],
        env={"PATH": f"{directory}:{os.environ['PATH']}", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout.strip()


@pytest.mark.parametrize(
    ("gpus", "tasks", "expected"),
    [
        ("8", "1(x4)", "GPUs: 0,1,2,3,4,5,6,7"),
        ("2", "1", "GPUs: 0,1"),
        ("1", "1(x2)", "GPUs: by task"),
        ("8", "8(x4)", "GPUs: by task"),
        # A node without GPUs.
        ("", "1(x2)", "GPUs: by task"),
    ],
)
def test_the_tasks_of_a_node_use_all_its_gpus(tmp_path, gpus, tasks, expected):
    variables = {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    code, output = devices_of_tasks(tmp_path, SLURM_TASKS_PER_NODE=tasks, **variables)
    assert (code, output) == (0, expected)


def test_gpus_that_were_chosen_are_kept(tmp_path):
    variables = {"SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "1"}
    code, output = devices_of_tasks(tmp_path, **variables, JAX_LOCAL_DEVICE_IDS="4,5")
    assert (code, output) == (0, "GPUs: 4,5")


def test_tasks_that_would_leave_gpus_idle_are_rejected(tmp_path):
    variables = {"SLURM_GPUS_ON_NODE": "8", "SLURM_TASKS_PER_NODE": "2(x4)"}
    code, output = devices_of_tasks(tmp_path, **variables)
    assert code == 1 and "GPUs:" not in output
    assert output.startswith("error: 2 tasks per node cannot share its 8 GPUs.")
    assert "--ntasks-per-node=8" in output
