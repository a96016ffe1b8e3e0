"""A workdir of an earlier version can be resumed, evaluated and loaded."""

import tarfile

import pytest

from resnet_jax.weights.load import load
from tests.helpers import runs

# Stopped by SIGTERM at step 8 of 12, by the last version before 0.2.0.
STOPPED = runs.ROOT / "tests" / "golden" / "workdir_0.1.tar.xz"
FLAGS = (
    "--config=configs/quickstart.py",
    "--config.model.overrides={'stage_sizes':(1,1),'widths':(8,16),'stem':((3,1,8),)}",
    "--config.batch_size=32",
    "--config.total.steps=12",
    "--config.optim.warmup.steps=2",
    "--config.evaluate.every.steps=6",
    "--config.checkpoint.every.steps=6",
    "--config.log_every.steps=1",
    "--config.ema_decay=0.9",
    "--config.checkpoint.keep_last=1",
    "--config.checkpoint.keep_best=0",
)
# The loss of the same run by that version without a stop. Rounding differs between
# CPUs, by far less than the tolerance in the twelfth step.
LOSS, TOLERANCE = 2.3093341933356393, 1e-4


@pytest.mark.slow
def test_a_run_of_an_earlier_version_resumes_and_ends_as_it_would_have(tmp_path):
    with tarfile.open(STOPPED) as archive:
        archive.extractall(tmp_path, filter="data")
    workdir = tmp_path / "run"
    card, variables = load(str(workdir))
    assert card.network == "cifar_resnet20" and len(card.classes) == 10
    assert variables["params"]["head"]["kernel"].shape == (16, 10)
    code, output = runs.run(workdir, *FLAGS)
    assert code == 0, output
    assert "from the checkpoint of step 8" in output
    assert runs.result(workdir)["loss"] == pytest.approx(LOSS, rel=TOLERANCE)
    code, output = runs.run(workdir, "--mode=eval", "--checkpoint=last")
    assert code == 0, output
    evaluated = runs.read_json(workdir / "eval_test.json")
    assert evaluated["loss"] == runs.result(workdir)["loss"]
