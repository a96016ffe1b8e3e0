"""`python -m resnet_jax.bench schedule`: rates and decay of configs, without runs."""

import json

import matplotlib.image
import pytest

from resnet_jax.bench import __main__ as command
from resnet_jax.bench import schedule
from resnet_jax.config import load
from resnet_jax.errors import UserError
from tests.helpers import runs

R50 = str(runs.ROOT / "configs" / "r50.py")


def test_a_config_is_drawn_without_its_data(tmp_path):
    picture = tmp_path / "lr.png"
    code, output = runs.run_python(
        *("-m", "resnet_jax.bench", "schedule", "--config=configs/r50.py", "--json"),
        *("--train_size=12800", f"--save={picture}"),
    )
    assert code == 0, output
    told = json.loads(output)
    assert told["config"] == "configs/r50.py"
    # 90 epochs of 12.5 steps.
    assert (told["steps"], told["batch_size"]) == (1125, 1024)
    # From a tenth of the warm-up's end to a thousandth of the peak.
    assert told["rate"] == pytest.approx([0.0004, 0.4])
    # Decay of 1e-4 through a momentum of 0.9.
    assert told["decay"] == pytest.approx([4e-7, 4e-4])
    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[:2] == (600, 800)
    # Something is drawn.
    assert pixels.std() > 0.05


def test_overrides_are_drawn_and_their_contradictions_told(capsys):
    def main(*flags):
        given = ("bench", "schedule", f"--config={R50}", "--train_size=12800", *flags)
        command.main(list(given))
        return capsys.readouterr().out

    assert "learning rate from 0.0004 to 0.4," in main()
    assert " to 0.8," in main("--config.optim.learning_rate=0.2")
    with pytest.raises(UserError, match=r"optim\.warmup .*config\.total"):
        main("--config.optim.warmup.epochs=90")


def test_the_size_is_that_given_or_the_sources_or_imagenets():
    config = load(R50)
    assert schedule.train_size_of(config, 7) == 7
    config.data.source = "fake:10:64"
    assert schedule.train_size_of(config, None) == 64
    config.data.shots = 2
    assert schedule.train_size_of(config, None) == 20
    config = load(R50)
    assert schedule.train_size_of(config, None) == 1_281_167


def test_data_that_are_not_there_are_told_with_the_way_out(tmp_path):
    config = load(R50)
    config.data.source = f"folder:{tmp_path}"
    with pytest.raises(UserError, match=r"Or give --train_size\."):
        schedule.train_size_of(config, None)


def test_a_config_may_take_an_argument(tmp_path):
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
