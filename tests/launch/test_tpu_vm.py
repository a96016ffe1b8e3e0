"""launch/tpu_vm.sh with a gcloud that records its calls and has two local workers."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.helpers import runs
from tests.helpers.packaging_files import needed_to_install

pytestmark = pytest.mark.slow

SCRIPT = runs.ROOT / "launch/tpu_vm.sh"
GCLOUD = runs.ROOT / "tests/helpers/fake_gcloud.py"
WHICH = ("--name=r50", "--zone=us-central2-b")
TPU = (*WHICH, "--accelerator=v4-16")
# The space and the quotes must reach the workers unchanged.
RUN = ("--workdir=gs://bucket/r50", "--config.model.overrides={'width': 8, 'a': 'b c'}")

# Takes the place of python3 on a worker, where uv makes an environment.
PYTHON3 = """#!/bin/bash
case "$*" in *"uv venv"*) mkdir -p .venv/bin; cp "$FAKE/run" .venv/bin/python;; esac
"""
# Takes the place of python in that environment: a run that ends with the next of the
# planned exit codes, waits while the file `hold` exists, or loses its TPU if `preempt`
# exists.
PYTHON = """#!/bin/bash
printf '%s\\n' "$@" > arguments
echo "step 1 here"
echo >> "$FAKE/started"
if rm "$FAKE/preempt" 2> /dev/null; then
    echo -n SUSPENDED > "$FAKE/state"
    kill -9 $PPID $$
fi
while [ -e "$FAKE/hold" ]; do sleep 0.1; done
code=$(head -n 1 "$FAKE/codes")
# Worker 1 is started last, so it removes the exit code that both have used.
case "$PWD" in *worker1*) sleep 0.3; sed -i 1d "$FAKE/codes";; esac
exit "${code:-0}"
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a fake gcloud and fake workers on the PATH; returns their directory."""
    for name, text in (
        ("gcloud", f'#!/bin/sh\nexec {sys.executable} -I -S {GCLOUD} "$@"\n'),
        ("python3", PYTHON3),
        ("run", PYTHON),
    ):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    for name in ("states", "codes", "calls"):
        (tmp_path / name).touch()
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.setenv("PAUSE", "0.1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    yield tmp_path
    (tmp_path / "hold").unlink(missing_ok=True)


def launch(*arguments):
    """Runs the script to its end; returns its exit code and its output."""
    done = subprocess.run(
        [SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


def calls(fake):
    """Returns the calls of gcloud so far, without `compute tpus`."""
    lines = (fake / "calls").read_text().splitlines()
    return [json.loads(line)[2:] for line in lines]


def kinds(fake):
    """Returns the calls that change something: create, delete and scp."""
    names = [call[1] for call in calls(fake)]
    return [name for name in names if name in ("create", "delete", "scp")]


def test_one_command_requests_a_tpu_trains_and_deletes_it(fake):
    code, output = launch(*TPU, "--spot", "--", *RUN)
    assert code == 0, output
    assert kinds(fake) == ["create", "scp", "delete"]
    create = next(call for call in calls(fake) if call[1] == "create")
    assert {"r50", "--node-id=r50", "--accelerator-type=v4-16", "--spot"} <= set(create)
    assert all("--zone=us-central2-b" in call for call in calls(fake))
    assert "step 1 here" in output


def test_flags_reach_every_worker_as_they_were_given(fake):
    assert launch(*TPU, "--keep", "--", *RUN)[0] == 0
    assert kinds(fake) == ["create", "scp"]
    for worker in ("worker0", "worker1"):
        home = fake / worker / "resnet_jax"
        arguments = (home / "arguments").read_text().splitlines()
        assert arguments == ["-u", "-m", "resnet_jax.main", "--distributed", *RUN]
        assert (home / "resnet_jax/main.py").exists()
        assert (home / "configs/r50.py").exists()
        assert all((home / name).exists() for name in needed_to_install())


def test_a_dry_run_prints_each_call_and_calls_nothing(fake):
    code, output = launch("--dry_run", *TPU, "--", *RUN)
    assert code == 0, output
    assert calls(fake) == []
    verbs = [line.split()[4] for line in output.splitlines() if "gcloud" in line]
    assert " ".join(verbs) == "describe create ssh scp ssh ssh ssh ssh delete"


def test_a_run_that_was_stopped_is_started_again_on_the_same_tpu(fake):
    (fake / "codes").write_text("143\n0\n")
    code, output = launch(*TPU, "--", *RUN)
    assert code == 0, output
    assert kinds(fake) == ["create", "scp", "scp", "delete"]


def test_a_tpu_that_is_taken_away_during_a_run_is_replaced(fake):
    (fake / "preempt").touch()
    code, output = launch(*TPU, "--", *RUN)
    assert code == 0, output
    assert kinds(fake) == ["create", "scp", "delete", "create", "scp", "delete"]


def test_a_request_that_was_suspended_while_it_waited_is_made_again(fake):
    (fake / "states").write_text("WAITING_FOR_RESOURCES\nSUSPENDED\nPROVISIONING\n")
    code, output = launch(*TPU, "--", *RUN)
    assert code == 0, output
    assert kinds(fake) == ["create", "delete", "create", "scp", "delete"]


def test_workers_that_cannot_be_set_up_end_the_command(fake):
    (fake / "python3").write_text("#!/bin/sh\necho no space left; exit 1\n")
    code, output = launch(*TPU, "--", *RUN)
    assert code == 1 and "no space left" in output and "cannot be set up" in output
    assert kinds(fake) == ["create"] + 5 * ["scp"]


def test_a_run_that_failed_leaves_the_tpu_and_its_exit_code(fake):
    (fake / "codes").write_text("7\n")
    code, output = launch(*TPU, "--", *RUN)
    assert code == 7, output
    assert kinds(fake) == ["create", "scp"]
    assert "--delete" in output
    # The same command uses that TPU again.
    code, output = launch(*TPU, "--", *RUN)
    assert code == 0, output
    assert kinds(fake) == ["create", "scp", "scp", "delete"]
    assert launch(*WHICH, "--delete")[0] != 0  # nothing is left to delete


def test_the_same_command_follows_a_run_that_is_running(fake):
    (fake / "hold").touch()

    def follow():
        process = subprocess.Popen(
            [SCRIPT, *TPU, "--", *RUN],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert any("step 1 here" in line for line in process.stdout)
        return process

    first = follow()
    os.killpg(first.pid, signal.SIGINT)  # as Ctrl-C in a terminal does
    first.communicate(timeout=20)
    second = follow()
    (fake / "hold").unlink()
    second.communicate(timeout=40)
    assert second.returncode == 0
    assert kinds(fake) == ["create", "scp", "delete"]
    assert (fake / "started").read_text().count("\n") == 2  # once on each worker


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--zone=z", "--accelerator=v4-8", "--", "--workdir=gs://b/r"), "--name"),
        (("--name=n", "--accelerator=v4-8", "--", "--workdir=gs://b/r"), "--zone"),
        ((*WHICH, "--", "--workdir=gs://b/r"), "--accelerator"),
        (TPU, "--workdir"),
        ((*TPU, "--", "--workdir=/tmp/r"), "gs://"),
        ((*TPU, "--node-count=2", "--", "--workdir=gs://b/r"), "launch/gke/run.py"),
    ],
)
def test_a_missing_flag_is_named_before_gcloud_is_called(fake, arguments, message):
    code, output = launch(*arguments)
    assert code == 1
    assert message in output and output.startswith("error: ")
    assert calls(fake) == []


def test_the_scripts_pass_shellcheck():
    shellcheck = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    others = ("launch/slurm.sbatch", "tests/wheel.sh", ".ci/run")
    scripts = [SCRIPT, *(runs.ROOT / name for name in others)]
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
