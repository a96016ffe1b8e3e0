"""Tests of `bench schedule`, the learning rate and weight decay of a config."""

import json

import matplotlib.image
import pytest

from resnet_jax.bench import __main__ as command
from resnet_jax.bench import schedule
from resnet_jax.config import load
from resnet_jax.errors import UserError
from tests.helpers import runs

R50 = str(runs.ROOT / "configs" / "r50.py")


def test_a_config_is_plotted_without_its_data(tmp_path):
    picture = tmp_path / "lr.png"
    code, output = runs.run_python(
        *("-m", "resnet_jax.bench", "schedule", "--config=configs/r50.py", "--json"),
        *("--train_size=12800", f"--save={picture}"),
    )
    assert code == 0, output
    summary = json.loads(output)
    assert summary["config"] == "configs/r50.py"
    # There are 90 epochs of 12.5 steps.
    assert (summary["steps"], summary["batch_size"]) == (1125, 1024)
    # The minimum is a thousandth of the peak.
    assert summary["rate"] == pytest.approx([0.0004, 0.4])
    # With a momentum of 0.9, a step removes 1e-4 / (1 - 0.9) times the learning rate.
    assert summary["decay"] == pytest.approx([4e-7, 4e-4])
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (600, 800)
    # An empty picture would have no contrast.
    assert pixels.std() > 0.05


def test_overrides_apply_and_contradictions_are_reported(capsys):
    def main(*flags):
        command.main(
            ["bench", "schedule", f"--config={R50}", "--train_size=12800", *flags]
        )
        return capsys.readouterr().out

    assert "learning rate from 0.0004 to 0.4," in main()
    assert " to 0.8," in main("--config.optim.learning_rate=0.2")
    with pytest.raises(UserError, match=r"optim\.warmup .*config\.total"):
        main("--config.optim.warmup.epochs=90")


def test_the_number_of_images_comes_from_flag_source_or_known_data_set():
    config = load(R50)
    assert schedule.find_train_size(config, 7) == 7
    config.data.source = "fake:10:64"
    assert schedule.find_train_size(config, None) == 64
    config.data.shots = 2
    assert schedule.find_train_size(config, None) == 20
    config = load(R50)
    assert schedule.find_train_size(config, None) == 1_281_167


def test_the_error_for_missing_data_names_the_flag_for_their_size(tmp_path):
    config = load(R50)
    config.data.source = f"folder:{tmp_path}"
    with pytest.raises(UserError, match=r"Or give --train_size\."):
        schedule.find_train_size(config, None)


def test_a_config_file_may_take_an_argument(tmp_path):
    file = tmp_path / "config.py"
    file.write_text(
        "from resnet_jax.config import defaults\n"
        "def get_config(rate):\n"
        "    config = defaults.get_config()\n"
        "    config.optim.learning_rate = float(rate)\n"
        "    return config\n"
    )
    assert load(f"{file}:0.7").optim.learning_rate == 0.7
    with pytest.raises(UserError, match="no config"):
        load(str(tmp_path / "other.py"))
