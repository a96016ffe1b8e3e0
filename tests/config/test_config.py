"""Configs: golden texts, files, durations, overrides, old keys and comparison."""

import copy
import json
import pickle
import re
import runpy

import pytest
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax.config.durations import to_steps
from resnet_jax.config.old_keys import changed_removed
from resnet_jax.config.saved import (
    MAY_CHANGE,
    as_json,
    as_text,
    differences,
    flatten,
    from_saved,
)
from resnet_jax.config.variants import for_dry_run
from resnet_jax.errors import UserError
from tests.helpers.golden_configs import CONFIGS, GOLDEN, RECIPES, golden, load


@pytest.mark.parametrize("name", RECIPES)
def test_the_config_of_every_recipe_equals_its_golden_text(name):
    """Run `python -m tests.helpers.golden_configs` to accept a change."""
    assert as_text(load(name)) == golden(name).read_text()


def test_every_golden_text_has_a_recipe():
    assert set(GOLDEN.glob("*.txt")) == {golden(name) for name in RECIPES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_without_a_variant_is_one_of_its_variants(path):
    variants = [name for name in RECIPES if name.partition(":")[0] == path.stem]
    default = as_text(load(path.stem))
    assert default in [as_text(load(name)) for name in variants]


def test_an_unknown_variant_is_an_error_that_lists_the_variants():
    with pytest.raises(UserError, match=r"no variant 'a4'.*a1, a2, a3"):
        load("rsb:a4")


@pytest.mark.parametrize(
    ("text", "variant", "message"),
    [
        ("def get_config(): ...", ":x", r"c\.py has no variants; leave :x out\.$"),
        (
            "def get_config(x): ...",
            "",
            r"c\.py needs a variant; write .*c\.py:VARIANT\.$",
        ),
        ("x = 1", "", r"c\.py is not a config; it has no function get_config\.$"),
        (
            "def get_config(): return 1",
            "",
            r"c\.py is not a config; get_config returned int",
        ),
        (
            "import notthere",
            "",
            r"c\.py cannot be imported: No .* 'notthere'",
        ),
        ("a\nroot:x:0:0", "", r"c\.py is not valid Python: line 2: "),
    ],
)
def test_a_file_that_is_not_a_config_is_an_error_that_says_why(
    text, variant, message, tmp_path
):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match=message):
        config_lib.load(f"{tmp_path}/c.py{variant}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_docstring_of_every_recipe_has_the_command_that_runs_it(path):
    doc = runpy.run_path(str(path))["__doc__"]
    command = rf"python -m resnet_jax.main --config=configs/({path.stem}.py\S*) --work"
    (named,) = re.findall(command, doc)
    assert named.replace(".py", "") in (*RECIPES, path.stem)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ({"steps": 7}, 7),
        ({"epochs": 2}, 20),
        ({"epochs": 0.25}, 2),
        ({"examples": 1000}, 10),
        ({"examples": 1}, 1),
        ({"epochs": 0}, 0),
    ],
)
def test_durations_become_steps(duration, steps):
    assert to_steps(duration, 100, 1000, "total") == steps


@pytest.mark.parametrize(
    "duration", [{}, {"days": 3}, {"steps": 1, "epochs": 1}, {"steps": "many"}]
)
def test_a_malformed_duration_is_an_error_that_names_its_key(duration):
    with pytest.raises(UserError, match="total"):
        to_steps(duration, 100, 1000, "total")


def test_an_unknown_key_is_an_error_that_names_the_nearest():
    config = load("quickstart")
    with pytest.raises(UserError, match=r"Did you mean optim\.learning_rate"):
        config_lib.override(config, ["--config.optim.learnin_rate=1"])


def test_only_keys_that_change_no_parameter_may_differ_on_a_resume():
    old = json.loads(as_json(load("quickstart")))
    new = load("quickstart")

    def may_change(key: str) -> bool:
        return key.startswith(MAY_CHANGE)

    assert differences(old, new, may_change) == []
    new.data.num_workers = 7
    new.data.on_bad_image = "skip"
    new.checkpoint.keep_last = 9
    assert differences(old, new, may_change) == []
    new.optim.learning_rate = 0.2
    changed = ["optim.learning_rate: 0.1 -> 0.2"]
    assert differences(old, new, may_change) == changed
    assert len(differences(old, new)) == 4


def test_a_run_older_than_a_key_resumes_with_the_default():
    old = json.loads(as_json(load("quickstart")))
    del old["data"]["policy"], old["data"]["color_jitter"], old["seed"]
    new = load("quickstart")
    assert differences(old, new) == []
    new.data.policy = "trivial_wide"
    assert differences(old, new) == ["data.policy: '' -> 'trivial_wide'"]
    # A duration has a single unit, which may differ from that of the default.
    new = load("quickstart")
    new.total = ConfigDict({"steps": 5})
    old = json.loads(as_json(new))
    assert differences(old, new) == []
    new.total = ConfigDict({"examples": 7})
    assert differences(old, new) == [
        "total.examples: 'nothing' -> 7",
        "total.steps: 5 -> 'nothing'",
    ]
    del old["total"]
    assert differences(old, new) == [
        "total.epochs: 90 -> 'nothing'",
        "total.examples: 'nothing' -> 7",
    ]


def test_a_dry_run_is_small_whatever_the_config():
    for path in CONFIGS:
        small = for_dry_run(load(path.stem), devices=8)
        assert small.total.to_dict() == {"steps": 2}
        assert small.batch_size == 16 * small.optim.microbatches
        assert small.data.source.startswith("fake")
        assert small.data.image_size <= 64


def test_sections_that_an_older_config_lacks_have_their_defaults():
    old = json.loads(as_json(load("quickstart")))
    del old["mix"], old["loss"], old["optim"]["name"], old["optim"]["schedule_length"]
    new = load("quickstart")
    assert differences(old, new) == []
    new.mix.mixup_alpha = 0.2
    new.optim.name = "lamb"
    new.optim.schedule_length = {"epochs": 3}
    assert differences(old, new) == [
        "mix.mixup_alpha: 0.0 -> 0.2",
        "optim.name: 'sgd' -> 'lamb'",
        "optim.schedule_length.epochs: 'nothing' -> 3",
    ]


def test_the_decay_rate_of_an_ema_is_rescaled_as_in_torchvision():
    # Eight GPUs with 128 images, every 32 steps, 600 epochs.
    decay = config_lib.rescaled_ema_decay(
        0.99998, batch_size=1024, every=32, epochs=600
    )
    assert 1 - decay == pytest.approx(2e-5 * 8 * 128 * 32 / 600)


@pytest.mark.parametrize(("text", "value"), [("0.1", 0.1), ("group", "group")])
def test_a_field_without_an_override_is_an_error_with_the_flag_that_sets_it(
    text, value
):
    config = load("r50")
    flag = f"--config.model.overrides.field={text}"
    with pytest.raises(
        UserError, match=r"model\.overrides does not set field yet; set all"
    ) as raised:
        config_lib.override(config, [flag])
    (proposed,) = re.findall(r'(--config\.[^=]+=)"(.*)"$', str(raised.value))
    before = config.model.overrides.to_dict()
    config_lib.override(config, ["".join(proposed)])
    assert config.model.overrides.to_dict() == before | {"field": value}


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--config.batch_size=512", "batch_size", 512),
        ("--config.model.name=resnet18", "model.name", "resnet18"),
        # A key for a number or a word takes either, without quotes.
        ("--config.model.bn_group_size=64", "model.bn_group_size", 64),
        ("--config.model.bn_group_size=device", "model.bn_group_size", "device"),
        # A duration in another unit and a dictionary replace the previous value.
        ("--config.total.steps=5", "total.steps", 5),
        (
            "--config.model.overrides={'drop_path': 0.1}",
            "model.overrides.drop_path",
            0.1,
        ),
    ],
)
def test_an_override_replaces_one_key_and_no_other(argument, key, value):
    before, changed = load("r50"), load("r50")
    config_lib.override(changed, [argument])
    path = key.rpartition(".")[0]
    others = {
        name: old
        for name, old in flatten(before).items()
        if name != key and not (path in ("total", "model.overrides") and path in name)
    }
    assert flatten(changed) == others | {key: value}


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--config.data.flip=true", "data.flip", True),
        ("--config.data.flip=0", "data.flip", False),
        ("--config.data.flip", "data.flip", True),
        ("--noconfig.data.flip", "data.flip", False),
        ("-config.seed=3", "seed", 3),
        ("--config.seed=0x10", "seed", 16),
        ("--config.batch_size=1e3", "batch_size", 1000),
        ("--config.optim.learning_rate=1", "optim.learning_rate", 1.0),
        ("--config.optim.learning_rate=1e-3", "optim.learning_rate", 1e-3),
        ("--config.data.mean=0.5,0.5,0.5", "data.mean", (0.5, 0.5, 0.5)),
        ("--config.data.policy=", "data.policy", ""),
        ("--config.model.fused_norm=false", "model.fused_norm", False),
        ("--config.optim.schedule_length.epochs=9", "optim.schedule_length.epochs", 9),
    ],
)
def test_an_override_has_the_type_of_the_key(argument, key, value):
    config = load("r50")
    config_lib.override(config, [argument])
    got = flatten(config)[key]
    assert (got, type(got)) == (value, type(value))


def test_an_override_may_have_its_value_in_the_next_argument():
    config = load("r50")
    arguments = ["--config.seed", "-3", "--config.data.flip", "--config.batch_size=8"]
    config_lib.override(config, arguments)
    assert (config.seed, config.data.flip, config.batch_size) == (-3, True, 8)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.batch_size=many", "is not a number"),
        ("--config.batch_size=2.5", "is not a whole number"),
        ("--config.batch_size=", "is not a number"),
        ("--config.batch_size", "needs a value: --config.batch_size=VALUE"),
        ("--config.model.name", "needs a value: --config.model.name=VALUE"),
        ("--config.optim.learning_rate=nan", "learning_rate=nan is not a number"),
        ("--config.total.epochs=inf", "total.epochs=inf is not a number"),
        ("--config.data.flip=maybe", "data.flip=maybe is neither true nor false"),
        ("--config.data.mean=dark", r"not a tuple, such as \"\(0\.485,"),
        ("--config.evaluate.sets=imagenet_a", r"not a tuple, such as \"\('a', 'b'\)"),
        ("--config.total=90", r"no unit\. Write --config\.total\.epochs=NUMBER"),
        ("--config.model.overrides=90", r"not a dictionary, such as \"{'"),
        (
            "--config.optim={'momentum': 0}",
            "optim is a section; set its keys one by one",
        ),
        ("--config.total.days=9", "no key 'total.days'"),
        ("--config.seed.x=9", "no key 'seed.x'"),
        ("--config.batch=5", "Did you mean batch_size"),
        ("batch_size=5", "Overrides are written --config.KEY=VALUE"),
    ],
)
def test_an_illegal_override_is_an_error_that_says_why(argument, message):
    with pytest.raises(UserError, match=message):
        config_lib.override(load("r50"), [argument])


def test_a_users_config_may_start_from_a_recipe(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from resnet_jax.config import RECIPES, load\n"
        "def get_config():\n"
        '    config = load(RECIPES / "rsb.py:a2")\n'
        "    config.batch_size = 48\n"
        "    return config\n"
    )
    config = config_lib.load(tmp_path / "mine.py")
    expected = load("rsb:a2")
    expected.batch_size = 48
    assert as_text(config) == as_text(expected)


@pytest.mark.parametrize(
    "line", ["config.optim.learning_rat = 1", 'config["batchsize"] = 8']
)
def test_a_file_that_sets_an_unknown_key_is_an_error_with_the_line(line, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from resnet_jax.config import defaults\n"
        "def get_config():\n"
        "    config = defaults.get_config()\n"
        f"    {line}\n"
        "    return config\n"
    )
    with pytest.raises(
        UserError, match=r"mine\.py, line 4: There is no key '\w+'\. Did you mean"
    ):
        config_lib.load(tmp_path / "mine.py")


def test_the_json_of_a_run_is_not_a_config_file(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json is not a config; .* Python"):
        config_lib.load(tmp_path / "config.json")


def test_a_config_file_of_version_0_1_is_an_error_with_the_new_imports(tmp_path):
    (tmp_path / "old.py").write_text("from configs import common\n")
    (tmp_path / "older.py").write_text("import configs.common\n")
    with pytest.raises(UserError, match=r"resnet_jax\.config\.defaults"):
        config_lib.load(tmp_path / "old.py")
    with pytest.raises(UserError, match=r"resnet_jax\.config\.defaults"):
        config_lib.load(tmp_path / "older.py")


def test_recipes_are_found_from_any_directory_and_a_users_file_is_preferred(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert config_lib.load("configs/wrn_28_10.py").model.name == "wrn28_10"
    with pytest.raises(UserError, match=r"Did you mean configs/quickstart\.py"):
        config_lib.load("configs/quickstrat.py")
    (tmp_path / "configs").mkdir()
    # Recipes that start from cifar10.py still find the one that they ship with.
    own = "from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()"
    (tmp_path / "configs" / "cifar10.py").write_text(own)
    assert not config_lib.load("configs/cifar10.py")
    assert config_lib.load("configs/wrn_28_10.py").model.name == "wrn28_10"


# Keys of the previous version.


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
    assert changed_removed(saved) == []


def test_a_network_trained_with_another_value_of_a_removed_key_may_still_be_used():
    config = load("quickstart")
    saved = json.loads(as_json(config))
    saved["optim"] |= {"rms_decay": 0.8}
    assert as_text(from_saved(saved)) == as_text(config)
    # Such a run is not resumed.
    (change,) = changed_removed(saved)
    assert change.startswith("optim.rms_decay: 0.8 -> 0.9")


def test_old_keys_work_after_a_config_was_loaded(caplog):
    config = load("quickstart")
    config.bn_recompute = 7
    config.model.update({"unwritten": False})
    config.optim.rms_decay = 0.9
    for name in ("bn_recompute is now", "model.unwritten is now", "rms_decay was rem"):
        assert name in caplog.text
    assert (config.precise_bn, config.bn_recompute) == (7, 7)
    assert config.model.fused_norm is False
    assert config.optim.rms_decay == 0.9
    copies = (
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
        config.copy_and_resolve_references(),
    )
    for config in copies:
        config.bn_recompute += 1
        assert config.precise_bn == 8
        assert "bn_recompute" not in flatten(config)


def test_a_config_is_equal_to_a_plain_one_with_the_same_keys():
    config = load("quickstart")
    plain = ConfigDict(config)
    assert config == plain
    assert plain == config
    config.seed += 1
    assert config != plain
    assert plain != config


@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_a_whole_section_may_be_replaced(kind):
    config = load("quickstart")
    config.optim = kind({"name": "lars"})
    assert config.optim.to_dict() == {"name": "lars"}
