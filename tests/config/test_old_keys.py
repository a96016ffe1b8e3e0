"""Keys of the previous version: warnings, errors and saved configs."""

import json

import pytest
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax.config.saved import (
    as_json,
    as_text,
    differences,
    flatten,
    from_saved,
)
from resnet_jax.errors import UserError
from tests.helpers.golden_configs import load


def load_line(tmp_path, line: str, base: str = "defaults.get_config()") -> ConfigDict:
    """Loads a config file that has one line of its own."""
    (tmp_path / "mine.py").write_text(
        "from resnet_jax.config import RECIPES, defaults, load\n"
        "def get_config():\n"
        f"    config = {base}\n"
        f"    {line}\n"
        "    return config\n"
    )
    return config_lib.load(tmp_path / "mine.py")


def override_line(tmp_path, line: str) -> ConfigDict:
    """Applies the line `config.KEY = VALUE` as an override."""
    config = load("r50")
    config_lib.override(config, [f"--{line.replace(' ', '')}"])
    return config


@pytest.mark.parametrize("change", [load_line, override_line])
def test_a_removed_key_with_its_default_is_a_warning(change, tmp_path, caplog):
    config = change(tmp_path, "config.optim.rms_decay = 0.9")
    assert "optim.rms_decay was removed and has no effect" in caplog.text
    assert "rms_decay" not in config.optim


@pytest.mark.parametrize("change", [load_line, override_line])
def test_a_removed_key_with_another_value_is_an_error(change, tmp_path):
    with pytest.raises(
        UserError, match=r"optim\.rms_decay was removed, .* always 0\.9, not 0\.8"
    ):
        change(tmp_path, "config.optim.rms_decay = 0.8")


def test_a_removed_key_may_be_set_on_top_of_a_recipe(tmp_path, caplog):
    line = "config.optim.trust_coefficient = 0.001"
    config = load_line(tmp_path, line, base='load(RECIPES / "rsb.py:a2")')
    assert "optim.trust_coefficient was removed" in caplog.text
    assert as_text(config) == as_text(load("rsb:a2"))
    assert config.is_locked
    # Overrides of the network may still be added.
    config.model.overrides.drop_path_by = "stage"


@pytest.mark.parametrize("change", [load_line, override_line])
@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("config.bn_recompute = 7", "precise_bn", 7),
        ("config.model.unwritten = False", "model.fused_norm", False),
    ],
)
def test_a_renamed_key_works_with_a_warning(change, line, key, value, tmp_path, caplog):
    config = change(tmp_path, line)
    old = line.partition(" ")[0].removeprefix("config.")
    assert f"The key {old} is now called {key}." in caplog.text
    assert flatten(config)[key] == value
    assert old not in flatten(config)


def test_a_config_file_may_read_old_keys(tmp_path):
    line = "config.label_smoothing = config.optim.rms_decay + config.bn_recompute"
    assert load_line(tmp_path, line).label_smoothing == 0.9


def test_the_saved_config_of_an_older_run_keeps_its_meaning(caplog):
    config = load("quickstart")
    saved = json.loads(as_json(config))
    saved["optim"] |= {"rms_decay": 0.9, "trust_coefficient": 0.001}
    saved["bn_recompute"] = saved.pop("precise_bn") + 4
    saved["model"]["unwritten"] = saved["model"].pop("fused_norm")
    config.precise_bn += 4
    assert as_text(from_saved(saved)) == as_text(config)
    assert differences(saved, config) == []
    assert not caplog.text
    saved["optim"]["rms_decay"] = 0.8
    with pytest.raises(UserError, match=r"optim\.rms_decay was removed"):
        from_saved(saved)
