"""A run that is killed, stopped or damaged resumes by the same command, bit for bit."""

import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time

import psutil
import pytest

from tests.helpers import runs

# A run that is longer than any test waits for.
LONG = tuple(
    f"--config.{key}.steps=9000"
    for key in ("total", "evaluate.every", "checkpoint.every")
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Returns the workdir of a run that was never interrupted."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = runs.run(workdir, *runs.SMALL)
    assert code == 0, output
    return workdir


def metric_rows(workdir):
    """Returns the logged rows, without the figures that depend on the clock."""
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row.split('"train/images_per_second"')[0] for row in rows]


def resume(workdir, *flags):
    """Runs to the end; returns the output."""
    code, output = runs.run(workdir, *runs.SMALL, *flags)
    assert code == 0, output
    return output


# Before any checkpoint, while one is being written, after an evaluation, at the end.
@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        pytest.param("step 2/", marks=pytest.mark.long),
        "step 10/",
        pytest.param("step 15/40  eval", marks=pytest.mark.long),
        pytest.param("step 39/", marks=pytest.mark.long),
    ],
)
def test_a_killed_run_ends_with_the_same_parameters(line, undisturbed, tmp_path):
    process = runs.start(tmp_path / "run", *runs.SMALL)
    code, _ = runs.send_when(process, line, signal.SIGKILL)
    assert code == -signal.SIGKILL
    resume(tmp_path / "run")
    runs.assert_same_end(tmp_path / "run", undisturbed)
    assert metric_rows(tmp_path / "run") == metric_rows(undisturbed)


@pytest.mark.long
def test_a_run_killed_many_times_ends_with_the_same_parameters(undisturbed, tmp_path):
    for line in ("step 6/", "step 11/", "step 16/", "step 23/", "step 31/", "step 37/"):
        process = runs.start(tmp_path / "run", *runs.SMALL)
        code, output = runs.send_when(process, line, signal.SIGKILL)
        assert code == -signal.SIGKILL, output
    resume(tmp_path / "run")
    runs.assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_sigterm_in_training_saves_that_step_and_exits_with_143(undisturbed, tmp_path):
    process = runs.start(tmp_path / "run", *runs.SMALL)
    code, output = runs.send_when(process, "step 7/", signal.SIGTERM)
    assert code == 143, output
    # The signal may arrive in a step after that of the line.
    assert runs.checkpoint_steps(tmp_path / "run")[-1] in range(7, 15)
    assert "the same command resumes the run" in output
    resume(tmp_path / "run")
    runs.assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_sigterm_while_compiling_ends_the_run_with_nothing_saved(undisturbed, tmp_path):
    fresh = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "nothing compiled yet")}
    process = runs.start(tmp_path / "run", *runs.SMALL, **fresh)
    code, output = runs.send_when(process, "^compiling", signal.SIGTERM)
    assert code == 143, output
    assert output.endswith("compiling\nstopped by SIGTERM\n")
    assert runs.checkpoint_steps(tmp_path / "run") == []
    assert not (tmp_path / "run" / "running.json").exists()
    resume(tmp_path / "run")
    runs.assert_same_end(tmp_path / "run", undisturbed)


# Workers are only used for images that are not cached in memory.
UNCACHED = "--config.data.cache=none"
WORKERS = (UNCACHED, "--config.data.num_workers=2")


# `timeout`, systemd, Slurm and a terminal that is closed signal the workers as well.
# The first batch of an evaluation waits for its workers.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "number", "step"),
    [
        ("step 15/40  epoch", signal.SIGTERM, 15),
        # An evaluation takes seconds to start, and a step takes milliseconds.
        ("step 15/40  epoch", signal.SIGHUP, 15),
        pytest.param("step 7/", signal.SIGHUP, 8, marks=pytest.mark.long),
        pytest.param("step 20/", signal.SIGINT, 21, marks=pytest.mark.long),
        pytest.param("step 1/", signal.SIGTERM, 2, marks=pytest.mark.long),
        pytest.param("step 39/", signal.SIGHUP, 40, marks=pytest.mark.long),
    ],
)
def test_a_signal_to_all_processes_of_a_run_saves(
    line, number, step, undisturbed, tmp_path
):
    flags = (*runs.SMALL, *WORKERS)
    process = runs.start(tmp_path / "run", *flags, own_group=True)
    code, output = runs.send_when(process, line, number, to_group=True)
    assert code == 128 + number, output
    assert f"stopped by {number.name}" in output
    assert "Traceback" not in output and "error" not in output, output
    # The signal may arrive in a step after that of the line.
    assert runs.checkpoint_steps(tmp_path / "run")[-1] in (step - 1, step, step + 1)
    resume(tmp_path / "run", UNCACHED)
    runs.assert_same_end(tmp_path / "run", undisturbed)


def has_handlers(process):
    """Returns whether a run has set its last signal handler, that of SIGHUP."""
    status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    caught = re.search(r"SigCgt:\s*(\w+)", status)[1]
    return bool(int(caught, 16) & 1 << signal.SIGHUP - 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists signal handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("moment", [0.0, 0.4])
def test_a_signal_while_the_program_starts_ends_it(number, moment, tmp_path):
    process = runs.start(tmp_path / "run", *runs.SMALL, own_group=True)
    while process.poll() is None and not has_handlers(process):
        time.sleep(0.001)
    time.sleep(moment)
    os.killpg(process.pid, number)
    code, output = runs.finish(process, 60)
    assert code == 128 + number, output
    assert output == f"stopped by {number.name}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists signal handlers")
def test_a_signal_at_any_moment_ends_or_saves_the_run(undisturbed, tmp_path):
    flags = (*runs.SMALL, *WORKERS)
    moments = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 1.7, 2.3, 3.0, 4.0, 5.5, 7.0, 9.0)
    for moment in moments:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            process = runs.start(tmp_path / "run", *flags, own_group=True)
            time.sleep(moment)
            # Python ends as usual until it has run the first lines of the program.
            early = not has_handlers(process)
            os.killpg(process.pid, number)
            code, output = runs.finish(process, 60)
            early = early and code == -number
            assert code in (0, 128 + number) or early, (moment, number, output)
            assert "Traceback" not in output or early, (moment, number, output)
            assert not (tmp_path / "run" / "running.json").exists() or early
    resume(tmp_path / "run", UNCACHED)
    runs.assert_same_end(tmp_path / "run", undisturbed)


# Ignores signals as nohup does, and as a shell without job control does after an &.
IGNORING = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-u", "-m", "resnet_jax.main", *sys.argv[1:]])
"""


@pytest.mark.slow
def test_signals_that_were_ignored_at_the_start_stay_ignored(undisturbed, tmp_path):
    process = runs.start_python(
        *("-c", IGNORING, f"--workdir={tmp_path / 'run'}", *runs.SMALL, *WORKERS),
        own_group=True,
    )
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    os.killpg(process.pid, signal.SIGHUP)
    os.killpg(process.pid, signal.SIGINT)
    code, output = runs.finish(process)
    assert code == 0, output
    runs.assert_same_end(tmp_path / "run", undisturbed)


# Makes the terminal on stderr the controlling terminal, as it is after a login.
IN_A_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
os.dup2(2, 0), os.dup2(2, 1)
os.execv(sys.executable, [sys.executable, "-m", "resnet_jax.main", *sys.argv[1:]])
"""


# The terminal of ssh or of a window is closed, or the user presses Ctrl-C first.
@pytest.mark.slow
@pytest.mark.parametrize(
    "leave", ["close", pytest.param("\x03", marks=pytest.mark.long)]
)
def test_a_run_whose_terminal_is_closed_saves(leave, tmp_path):
    workdir = tmp_path / "run"
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 160))
    process = runs.start_python(
        *("-c", IN_A_TERMINAL, f"--workdir={workdir}", *runs.SMALL, *WORKERS, *LONG),
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    while not re.search(rb"\d\d/9000 \[", shown):
        shown += os.read(ours, 4096)
    if leave != "close":
        # Ctrl-C goes to all foreground processes, also to the workers.
        os.write(ours, leave.encode())
        while b"the same command" not in shown:
            shown += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(60) == (129 if leave == "close" else 130)
    assert runs.checkpoint_steps(workdir)[-1] >= 10
    assert not (workdir / "running.json").exists()


def wait_for_workers(process):
    """Waits until a run has started two workers, whose imports take seconds."""
    while len(workers := runs.workers_of(process)) != 2:
        time.sleep(0.01)
    return workers


@pytest.mark.slow
def test_workers_that_are_starting_end_with_a_run_that_is_killed(tmp_path):
    process = runs.start(tmp_path / "run", *runs.SMALL, *WORKERS, own_group=True)
    workers = wait_for_workers(process)
    # Workers ignore SIGTERM, which the run handles.
    for worker in workers:
        worker.terminate()
    time.sleep(0.5)
    assert all(worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    process.kill()
    assert runs.finish(process)[0] == -signal.SIGKILL
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


@pytest.mark.slow
def test_a_run_saves_on_a_signal_although_its_workers_were_killed(
    undisturbed, tmp_path
):
    process = runs.start(tmp_path / "run", *runs.SMALL, *WORKERS)
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGSTOP)
    for worker in wait_for_workers(process):
        worker.kill()
    process.send_signal(signal.SIGCONT)
    # The run notices the workers before the signal.
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    code, output = runs.finish(process)
    assert code == 143, output
    assert runs.checkpoint_steps(tmp_path / "run")[-1] >= 2
    assert "Traceback" not in output and "killed" not in output
    resume(tmp_path / "run", UNCACHED)
    runs.assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.long
def test_sigterm_in_evaluation_stops_at_the_batch_and_exits_with_143(
    undisturbed, tmp_path
):
    # With one image a batch the evaluation takes seconds, so the signal arrives in it.
    slow = (*runs.SMALL, "--config.evaluate.batch_size=1")
    process = runs.start(tmp_path / "run", *slow)
    code, output = runs.send_when(process, "step 15/40  epoch", signal.SIGTERM)
    assert code == 143, output
    assert "evaluated" not in output
    assert runs.checkpoint_steps(tmp_path / "run")[-1] == 15
    output = resume(tmp_path / "run")
    assert "step 15/40  evaluated" in output
    runs.assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_eval_mode_stops_with_143_too(undisturbed):
    slow = (*runs.SMALL, "--mode=eval", "--config.data.eval_split=train")
    process = runs.start(undisturbed, *slow, "--config.evaluate.batch_size=1")
    code, output = runs.send_when(process, "evaluating", signal.SIGTERM)
    assert code == 143, output
    assert "result:" not in output


@pytest.mark.long
def test_workers_and_threads_give_the_same_run(undisturbed, tmp_path):
    flags = (*runs.SMALL, "--config.data.num_workers=2")
    process = runs.start(tmp_path / "run", *flags)
    assert runs.send_when(process, "step 12/", signal.SIGKILL)[0] == -signal.SIGKILL
    code, output = runs.run(tmp_path / "run", *flags)
    assert code == 0, output
    runs.assert_same_end(tmp_path / "run", undisturbed)


def newest_data_file(workdir):
    files = (workdir / "checkpoints" / "40").rglob("*")
    return max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)


def cut_off(workdir):
    file = newest_data_file(workdir)
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(workdir):
    file = newest_data_file(workdir)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove_a_file(workdir):
    newest_data_file(workdir).unlink()


def empty_the_metadata(workdir):
    (workdir / "checkpoints" / "40" / "run" / "metadata").write_text("")


@pytest.mark.slow
@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(cut_off, marks=pytest.mark.long),
        flip_a_bit,
        remove_a_file,
        pytest.param(empty_the_metadata, marks=pytest.mark.long),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    harm, undisturbed, tmp_path
):
    shutil.copytree(undisturbed, tmp_path / "run")
    harm(tmp_path / "run")
    output = resume(tmp_path / "run")
    assert "The checkpoint of step 40" in output
    assert "resuming from the checkpoint of step 35" in output
    assert "Traceback" not in output
    assert (tmp_path / "run" / "damaged" / "40").is_dir()
    runs.assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_run_without_an_intact_checkpoint_does_not_start_again(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    for step in runs.checkpoint_steps(tmp_path / "run"):
        for file in (tmp_path / "run" / "checkpoints" / str(step)).rglob("*"):
            if file.is_file():
                os.truncate(file, 0)
    code, output = runs.run(tmp_path / "run", *runs.SMALL)
    assert code == 1
    assert "No older one is intact" in output.splitlines()[-1]
    assert runs.checkpoint_steps(tmp_path / "run") == [35, 40]


@pytest.mark.long
def test_a_save_that_does_not_fit_stops_the_run_and_loses_nothing(
    undisturbed, tmp_path
):
    # No file may exceed 60 kB, which to a program looks like a full disk.
    limit = 60_000
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    code, output = runs.run_python(
        "-c",
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},"
        f" {hard})); from resnet_jax import main; sys.exit(main.main(sys.argv))",
        f"--workdir={tmp_path / 'run'}",
        *runs.SMALL,
    )
    assert code == 1, output
    error = next(line for line in output.splitlines() if line.startswith("error"))
    assert "could not be written" in error
    assert "Traceback" not in output
    resume(tmp_path / "run")
    runs.assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_loses_nothing(undisturbed, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        code, output = runs.run(disk / "run", *runs.SMALL)
        assert code == 1, output
        error = next(line for line in output.splitlines() if line.startswith("error"))
        assert "No space left on device" in error
        assert "Traceback" not in output
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        resume(disk / "run")
        runs.assert_same_end(disk / "run", undisturbed)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_second_sigterm_does_not_cut_the_saving_short(tmp_path):
    process = runs.start(tmp_path / "run", *runs.SMALL)
    for line in process.stdout:
        if line.startswith("step 7/"):
            break
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
    assert runs.finish(process)[0] == 143
    assert runs.checkpoint_steps(tmp_path / "run")[-1] >= 7


@pytest.mark.slow
def test_a_killed_worker_stops_the_run_with_a_sentence_and_leaves_nothing(tmp_path):
    flags = ("--config.data.num_workers=2", "--config.data.cache=none")
    process = runs.start(tmp_path / "run", *runs.SMALL, *flags, *LONG)
    for line in process.stdout:
        if line.startswith("step 2/"):
            break
    children = psutil.Process(process.pid).children(recursive=True)
    workers = runs.workers_of(process)
    assert len(workers) == 2
    # Only the memory of this run, since other programs share memory too.
    maps = [memory.path for child in workers for memory in child.memory_maps()]
    shared = {path for path in maps if path.startswith("/dev/shm/")}
    assert shared
    workers[0].kill()
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: A process that decodes images was killed" in rest
    assert "Traceback" not in rest
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not any(map(os.path.exists, shared))
