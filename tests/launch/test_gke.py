"""launch/gke: the manifest against Kubernetes' schemas, run.py with a fake kubectl."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import yaml
from kubernetes_validate import validate

from tests.helpers import runs
from tests.helpers.packaging_files import needed_to_install

RUN = runs.ROOT / "launch/gke/run.py"
NAME = ("--name=r50", "--image=registry/r50:1")
TPU = (
    "--accelerator=tpu-v5-lite-podslice",
    "--topology=4x4",
    "--hosts=4",
    "--chips=4",
    "--slices=2",
    "--spot",
)
GPU = ("--accelerator=nvidia-h100-80gb", "--hosts=2", "--chips=8")
TRAIN = ("--", "--config=configs/r50.py", "--workdir=gs://bucket/r50")

# The fields of jobset.x-k8s.io/v1alpha2 in JobSet 0.9, and the values of the fields
# that have a fixed set of them. The embedded Job is Kubernetes' own.
SPEC = {"replicatedJobs", "network", "successPolicy", "failurePolicy", "suspend"}
REPLICATED_JOB = {"name", "groupName", "replicas", "template", "dependsOn"}
FAILURE_POLICY = {"maxRestarts", "restartStrategy", "rules"}
RULE = {
    "name",
    "action",
    "onJobFailureReasons",
    "onJobFailureMessagePatterns",
    "targetReplicatedJobs",
}
STRATEGIES = {"Recreate", "BlockingRecreate", "InPlaceRestart"}
ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}


def launch(*arguments, **environment):
    """Runs run.py; returns its exit code and its output."""
    done = subprocess.run(
        [sys.executable, RUN, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def jobset(*arguments):
    """Returns the manifest that `--dry_run` prints."""
    code, output = launch("--dry_run", *NAME, *arguments)
    assert code == 0, output
    return yaml.safe_load(output)


def container(manifest):
    """Returns the container of a manifest's pods."""
    (job,) = manifest["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("kind", [TPU, GPU], ids=["tpu", "gpu"])
def test_kubernetes_and_jobset_accept_the_manifest(kind):
    manifest = jobset(*kind, *TRAIN)
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert manifest["kind"] == "JobSet"
    spec = manifest["spec"]
    assert spec.keys() <= SPEC
    assert spec["failurePolicy"].keys() <= FAILURE_POLICY
    assert spec["failurePolicy"]["restartStrategy"] in STRATEGIES
    for rule in spec["failurePolicy"]["rules"]:
        assert rule.keys() <= RULE and rule["action"] in ACTIONS
        assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    for replicated in spec["replicatedJobs"]:
        assert replicated.keys() <= REPLICATED_JOB
        job = {"apiVersion": "batch/v1", "kind": "Job", **replicated["template"]}
        job["metadata"] = {"name": "r50-hosts-0"}
        # Unknown fields are errors. Kubernetes 1.31 is the first with a stable
        # podFailurePolicy.
        validate(job, "1.31", strict=True)


def test_a_stopped_run_always_restarts_and_a_failed_one_only_some_times():
    spec = jobset(*TPU, *TRAIN)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    rules = job["podFailurePolicy"]["rules"]
    assert all(rule["action"] == "FailJob" for rule in rules)
    codes = [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule]
    assert codes == [[143]]
    conditions = [
        rule["onPodConditions"] for rule in rules if "onPodConditions" in rule
    ]
    assert conditions == [[{"type": "DisruptionTarget", "status": "True"}]]
    # A job that fails because of those rules has this reason.
    (always,) = spec["failurePolicy"]["rules"]
    assert always["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert always["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert 0 < spec["failurePolicy"]["maxRestarts"] < 10
    # Kubernetes accepts a podFailurePolicy only with this restart policy.
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    # A run exits within --grace=25s, and the end of Python takes some more.
    assert pod["terminationGracePeriodSeconds"] >= 25 + 15


def test_tpus_connect_by_themselves_and_gpus_to_the_first_pod():
    tpu, gpu = jobset(*TPU, *TRAIN), jobset(*GPU, *TRAIN)
    train = list(TRAIN[1:])
    assert container(tpu)["args"] == ["--distributed", *train]
    assert container(tpu)["resources"]["limits"] == {"google.com/tpu": 4}
    (job,) = gpu["spec"]["replicatedJobs"]
    assert job["replicas"] == 1 and job["template"]["spec"]["parallelism"] == 2
    # JobSet calls pods <set>-<replicated job>-<job>-<pod>.<set>.
    first = f"r50-{job['name']}-0-0.r50:8476"
    connect = [f"--coordinator={first}", "--num_processes=2"]
    connect += ["--process_id=$(JOB_COMPLETION_INDEX)"]
    assert container(gpu)["args"] == [*connect, *train]
    assert container(gpu)["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_flags_reach_the_run_as_they_were_given():
    odd = ("--config.a={'b': \"c d\"}", "--config.name=$(HOME) ${HOME}")
    *_, quoted, variable = container(jobset(*GPU, *TRAIN, *odd))["args"]
    assert quoted == odd[0]
    # Kubernetes replaces $$( by $( and looks up no variable.
    assert variable.replace("$$(", "$(") == odd[1] and "$$(HOME)" in variable


@pytest.mark.parametrize(
    ("state", "verbs"),
    [
        (None, ["get", "apply"]),
        ({}, ["get"]),
        ({"status": {"restarts": 2}}, ["get"]),
        ({"status": {"terminalState": "Failed"}}, ["get", "delete", "apply"]),
        ({"status": {"terminalState": "Completed"}}, ["get", "delete", "apply"]),
    ],
    ids=["none", "new", "runs", "failed", "completed"],
)
def test_the_same_command_starts_keeps_or_replaces_the_jobset(tmp_path, state, verbs):
    (tmp_path / "state").write_text("" if state is None else json.dumps(state))
    fake = tmp_path / "kubectl"
    fake.write_text(
        f'#!/bin/sh\ncd {tmp_path}\necho "$1" >> calls\n'
        'case "$1" in get) cat state;; apply) cat > applied;; esac\n'
    )
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    code, output = launch(*NAME, *GPU, *TRAIN, PATH=path)
    assert code == 0, output
    assert (tmp_path / "calls").read_text().split() == verbs
    if "apply" in verbs:
        _, manifest = launch("--dry_run", *NAME, *GPU, *TRAIN)
        assert (tmp_path / "applied").read_text() == manifest


def test_ctrl_c_ends_the_script_and_kubectl_without_a_traceback(tmp_path):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text("#!/bin/sh\necho waiting >&2\nexec sleep 60\n")
    kubectl.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, RUN, *NAME, *TPU, *TRAIN],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    assert process.stderr.readline() == "waiting\n"
    os.killpg(process.pid, signal.SIGINT)
    assert (process.communicate(timeout=30)[1], process.returncode) == ("", 130)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--name=R50", "--image=i", *GPU, *TRAIN), "--name=R50"),
        ((*NAME, *GPU), "--config"),
        ((*NAME, *GPU, *TRAIN[:2], "--workdir=/tmp/r50"), "gs://"),
        ((*NAME, *GPU, "--slices=2", *TRAIN), "--slices"),
        ((*NAME, *TPU, "--hosts=1", *TRAIN), "--slices needs slices of several"),
        ((*NAME, *GPU, "--hosts=0", *TRAIN), "--hosts"),
    ],
)
def test_a_wrong_flag_is_named_in_the_message(arguments, message):
    code, output = launch("--dry_run", *arguments)
    assert code == 2
    assert message in output.splitlines()[-1]


def test_the_image_holds_what_a_run_needs_and_lets_signals_through():
    lines = (runs.ROOT / "launch/gke/Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ")]
    copied = [path for paths in copies for path in paths]
    assert set(copied) == needed_to_install()
    assert all((runs.ROOT / path).exists() for path in copied)
    # The comment and the README name these values for PLATFORM.
    extras = importlib.metadata.metadata("jax").get_all("Provides-Extra")
    assert {"tpu", "cuda12", "cuda13"} <= set(extras)
    # As a list it starts no shell as process 1, which would keep SIGTERM from Python.
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT ")]
    assert json.loads(entry.split(" ", 1)[1])[-2:] == ["-m", "resnet_jax.main"]
