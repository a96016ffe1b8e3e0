"""`python -m resnet_jax.analysis.degradation`: the errors of several runs."""

import matplotlib.image
import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_jax.analysis import degradation
from resnet_jax.errors import UserError
from resnet_jax.training.loop import train
from tests.helpers import tiny


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Returns the workdirs of two short runs, of a residual and of a plain network."""
    root = tmp_path_factory.mktemp("runs")
    for name, shortcut in (("residual", "projection"), ("plain", "none")):
        config = tiny.config({"model.overrides.shortcut": shortcut})
        config.log_every = ConfigDict({"steps": 2})
        train(config, root / name)
    return root / "residual", root / "plain"


@pytest.mark.slow
def test_errors_are_percentages_of_wrong_predictions(workdirs):
    for workdir in workdirs:
        found = degradation.errors(workdir)
        assert [step for step, _ in found["train"]] == [2, 4]
        assert [step for step, _ in found["eval"]] == [4]
        # Each error is over two batches of 16 images.
        wrong = np.array([error for _, error in found["train"]]) * 32 / 100
        np.testing.assert_allclose(wrong, np.round(wrong), atol=1e-4)
        assert (wrong > 0).all()


@pytest.mark.parametrize("content", [b"", b'{"model": {"na', b"\xff", b"[]", b"{}"])
def test_a_damaged_config_is_a_warning(tmp_path, capsys, content):
    (tmp_path / "config.json").write_bytes(content)
    row = '{"step": 1, "train/top1": 0.5, "eval/top1": null}\n'
    (tmp_path / "metrics.jsonl").write_text(row)
    path = tmp_path / "errors.png"
    degradation.main(["degradation", f"--runs={tmp_path}", f"--save={path}"])
    printed = capsys.readouterr()
    assert printed.out.startswith(f"{tmp_path.name}: train error 50.00 %")
    assert f"{tmp_path / 'config.json'} cannot be read (" in printed.err
    assert (tmp_path / "config.json").read_bytes() == content


@pytest.mark.slow
def test_the_command_plots_all_runs(workdirs, tmp_path, capsys):
    pictures = []
    for count in (1, 2):
        path = tmp_path / f"{count}.png"
        runs = ",".join(map(str, workdirs[:count]))
        degradation.main(["degradation", f"--runs={runs}", f"--save={path}"])
        pictures.append(matplotlib.image.imread(path))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" (")[2][:5] for line in lines[2:4]] == ["resid", "plain"]
    assert "eval error" in lines[3]
    # The lines of the second run are plotted, too.
    assert (pictures[0] != pictures[1]).any()


def test_a_directory_without_metrics_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        degradation.errors(tmp_path)
