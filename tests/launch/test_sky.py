"""launch/sky.yaml: its fields, and its commands run in a shell."""

import os
import subprocess

import pytest
import yaml

from tests.helpers import runs


@pytest.fixture
def task():
    """Returns the task of sky.yaml."""
    return yaml.safe_load((runs.ROOT / "launch/sky.yaml").read_text())


def test_a_stopped_run_is_recovered(task):
    # Fields of SkyPilot's YAML (docs.skypilot.co/en/latest/reference/yaml-spec.html).
    fields = {"name", "workdir", "num_nodes", "resources", "envs", "setup", "run"}
    assert task.keys() <= fields
    assert task["resources"].keys() <= {"accelerators", "use_spot", "job_recovery"}
    recovery = task["resources"]["job_recovery"]
    assert recovery == {"recover_on_exit_codes": [143], "max_restarts_on_errors": 3}
    # SkyPilot does not start without a value for a variable that is null here.
    assert task["envs"]["WORKDIR"] is None


def test_each_machine_starts_one_process_of_the_run(task, tmp_path):
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/bash\nprintf '%s\\n' \"$@\"\nexit 143\n")
    python.chmod(0o755)
    variables = {
        "WORKDIR": "gs://bucket/r50",
        "FLAGS": "--config.seed=1 --grace=20s",
        "SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
    }
    done = subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=tmp_path,
        env=os.environ | task["envs"] | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 143, done.stderr
    assert done.stdout.splitlines() == [
        "-u",
        "-m",
        "resnet_jax.main",
        "--config=configs/r50.py",
        "--workdir=gs://bucket/r50",
        "--config.seed=1",
        "--grace=20s",
        "--coordinator=10.0.0.5:8476",
        "--num_processes=2",
        "--process_id=1",
    ]
