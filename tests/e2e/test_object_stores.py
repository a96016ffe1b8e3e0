"""A run whose workdir is in an object store behaves like one on a disk."""

import json
import signal

import pytest

from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import path_of
from resnet_jax.reports import curves
from resnet_jax.weights.load import load
from tests.helpers import pods, runs, stores

STORES = {"s3": stores.s3, "gs": stores.gcs}
# tests/persistence/test_storage.py tests how the stores differ.
both = pytest.mark.parametrize("store", STORES)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Returns the workdir of a run on this disk that was never interrupted."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, output = runs.run(workdir, *runs.SMALL)
    assert code == 0, output
    return workdir


def fetch(workdir, folder):
    """Copies a workdir to this disk."""
    for file in storage.files_of(workdir):
        copy = folder / file.relative_to(workdir)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return folder


def rows(workdir):
    """Returns the logged rows, without the figures that depend on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [line.split('"train/images_per_second"')[0] for line in lines]


@pytest.mark.long
@both
def test_a_killed_run_ends_with_the_same_parameters(store, undisturbed, tmp_path):
    environment = STORES[store]()
    workdir = f"{store}://bucket/killed"
    # The signal comes while the checkpoint of step 10 is written, or soon after.
    process = runs.start(workdir, *runs.SMALL, **environment)
    code, output = runs.send_when(process, "step 11/", signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    code, output = runs.run(workdir, *runs.SMALL, **environment)
    assert code == 0, output
    assert "resuming from the checkpoint of step" in output
    with stores.known(environment):
        copy = fetch(path_of(workdir), tmp_path / "run")
        runs.assert_same_end(copy, undisturbed)
        assert rows(copy) == rows(undisturbed)
        assert {file.name for file in copy.iterdir()} == {
            file.name for file in undisturbed.iterdir()
        }
        # Its results and weights can be read from the store.
        assert load(workdir)[0].top1 == 100 * runs.result(copy)["top1"]
        assert curves.draw(path_of(workdir)).read_bytes().startswith(b"\x89PNG")
    code, output = runs.run(workdir, *runs.SMALL, "--mode=eval", **environment)
    assert code == 0, output
    with stores.known(environment):
        evaluated = json.loads((path_of(workdir) / "eval_test.json").read_text())
    assert evaluated["top1"] == runs.result(copy)["best"]["top1"]


@pytest.mark.long
def test_sigterm_saves_in_a_store_and_releases_the_workdir():
    environment = stores.s3()
    workdir = "s3://bucket/stopped"
    process = runs.start(workdir, *runs.SMALL, **environment)
    code, output = runs.send_when(process, "step 7/", signal.SIGTERM)
    assert code == 143, output
    with stores.known(environment):
        names = {file.name for file in path_of(workdir).iterdir()}
        steps = [row.split(",")[0] for row in rows(path_of(workdir))]
        saved = max(int(p.name) for p in (path_of(workdir) / "checkpoints").iterdir())
    assert "running.json" not in names
    assert len(steps) == saved >= 7


@pytest.mark.long
@both
def test_processes_share_a_workdir_in_a_store(store, tmp_path):
    environment = STORES[store]()
    each = dict.fromkeys(range(2), environment)
    workdir = f"{store}://bucket/shared"
    short = (*runs.SMALL, "--config.total.steps=12")
    pods.run(2, workdir, *short, environments=each)
    local = tmp_path / "local"
    pods.run(2, local, *short)
    with stores.known(environment):
        runs.assert_same_end(fetch(path_of(workdir), tmp_path / "run"), local)


@pytest.mark.slow
def test_missing_credentials_of_one_process_are_reported_by_all():
    good = stores.s3()
    # Empty keys, since moto accepts any others; hosts differ in having none.
    bad = {**good, "AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}
    started = pods.start(
        2, "s3://bucket/refused", *runs.SMALL, environments={0: good, 1: bad}
    )
    for code, output in pods.finish(started, timeout=120):
        assert code == 1, output
        (error,) = pods.errors(output)
        assert "s3://bucket/refused cannot be used: no valid credentials" in error
        assert "process 1 (host" in error
