"""Durations, overrides, golden texts of every config, and what may change."""

import json
import pathlib
import re
import runpy

import pytest
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax import recipes
from resnet_jax.errors import UserError
from tests.runs import ROOT

CONFIGS = sorted(
    path for path in (ROOT / "configs").glob("*.py") if path.stem != "common"
)
GOLDEN = pathlib.Path(__file__).parent / "golden" / "configs"


# FILE or FILE:VARIANT
RECIPES = [name.replace(".py", "") for name, _, _ in recipes.variants()]


def load(name: str):
    stem, colon, variant = name.partition(":")
    return config_lib.load(str(ROOT / "configs" / f"{stem}.py{colon}{variant}"))


def golden(name: str) -> pathlib.Path:
    return GOLDEN / f"{name.replace(':', '.')}.txt"


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_its_golden_text_says(name):
    """To accept a change: python -m tests.make_golden_configs, and read the diff."""
    assert config_lib.as_text(load(name)) == golden(name).read_text()


def test_every_golden_text_has_a_recipe():
    assert set(GOLDEN.glob("*.txt")) == {golden(name) for name in RECIPES}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_file_without_its_argument_is_one_of_its_variants(path):
    variants = [name for name in RECIPES if name.partition(":")[0] == path.stem]
    default = config_lib.as_text(load(path.stem))
    assert default in [config_lib.as_text(load(name)) for name in variants]


def test_a_variant_that_is_none_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"no variant 'a4'.*a1, a2, a3"):
        load("rsb:a4")


@pytest.mark.parametrize(
    ("text", "variant", "message"),
    [
        ("def get_config(): ...", ":x", r"c\.py has no variants: leave :x out\.$"),
        ("def get_config(x): ...", "", r"c\.py needs a variant: .*c\.py:VARIANT\.$"),
        ("x = 1", "", r"c\.py is no config: it has no function get_config\.$"),
        ("a\nroot:x:0:0", "", r"c\.py is no config in Python: line 2: "),
    ],
)
def test_what_is_no_config_is_told(text, variant, message, tmp_path):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError, match=message):
        config_lib.load(f"{tmp_path}/c.py{variant}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_tells_the_command_that_runs_it(path):
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
    assert config_lib.to_steps(duration, 100, 1000, "total") == steps


@pytest.mark.parametrize(
    "duration", [{}, {"days": 3}, {"steps": 1, "epochs": 1}, {"steps": "many"}]
)
def test_a_wrong_duration_is_named(duration):
    with pytest.raises(UserError, match="total"):
        config_lib.to_steps(duration, 100, 1000, "total")


def test_a_duration_may_change_its_unit_on_the_command_line():
    argv = ["main", "--config=x.py", "--config.total.steps=5", "--config.seed=1"]
    assert config_lib.rewrite_durations(argv) == [
        "main",
        "--config=x.py",
        "--config.total={'steps': 5}",
        "--config.seed=1",
    ]


def test_an_unknown_key_is_answered_with_the_nearest():
    config = load("quickstart")
    with pytest.raises(UserError, match=r"optim\.learning_rate"):
        config_lib.check_keys(config, ["--config.optim.learnin_rate=1"])
    config_lib.check_keys(config, ["--config.optim.learning_rate=1", "--workdir=x"])


def test_only_what_changes_no_parameter_may_differ_when_a_run_goes_on():
    old = json.loads(config_lib.as_json(load("quickstart")))
    new = load("quickstart")

    def may_change(key: str) -> bool:
        return key.startswith(config_lib.MAY_CHANGE)

    assert config_lib.differences(old, new, may_change) == []
    new.data.num_workers = 7
    new.data.on_bad_image = "skip"
    new.checkpoint.keep_last = 9
    assert config_lib.differences(old, new, may_change) == []
    new.optim.learning_rate = 0.2
    changed = ["optim.learning_rate: 0.1 -> 0.2"]
    assert config_lib.differences(old, new, may_change) == changed
    assert len(config_lib.differences(old, new)) == 4


def test_a_run_from_before_a_key_goes_on_with_its_default():
    old = json.loads(config_lib.as_json(load("quickstart")))
    del old["data"]["policy"], old["data"]["color_jitter"], old["seed"]
    new = load("quickstart")
    assert config_lib.differences(old, new) == []
    new.data.policy = "trivial_wide"
    assert config_lib.differences(old, new) == ["data.policy: '' -> 'trivial_wide'"]
    # A duration has one key, whose unit the default does not share.
    new = load("quickstart")
    new.total = ConfigDict({"steps": 5})
    old = json.loads(config_lib.as_json(new))
    assert config_lib.differences(old, new) == []
    new.total = ConfigDict({"examples": 7})
    assert config_lib.differences(old, new) == [
        "total.examples: 'nothing' -> 7",
        "total.steps: 5 -> 'nothing'",
    ]
    del old["total"]
    assert config_lib.differences(old, new) == [
        "total.epochs: 90 -> 'nothing'",
        "total.examples: 'nothing' -> 7",
    ]


def test_a_dry_run_is_small_whatever_the_config():
    for path in CONFIGS:
        small = config_lib.for_dry_run(load(path.stem), devices=8)
        assert small.total.to_dict() == {"steps": 2}
        assert small.batch_size == 16 * small.optim.microbatches
        assert small.data.source.startswith("fake")
        assert small.data.image_size <= 64


def test_keys_that_an_older_config_lacks_have_their_defaults():
    old = json.loads(config_lib.as_json(load("quickstart")))
    del old["mix"], old["loss"], old["optim"]["name"], old["optim"]["schedule_length"]
    new = load("quickstart")
    assert config_lib.differences(old, new) == []
    new.mix.mixup_alpha = 0.2
    new.optim.name = "lamb"
    new.optim.schedule_length = {"epochs": 3}
    assert config_lib.differences(old, new) == [
        "mix.mixup_alpha: 0.0 -> 0.2",
        "optim.name: 'sgd' -> 'lamb'",
        "optim.schedule_length.epochs: 'nothing' -> 3",
    ]


def test_an_averages_decay_is_rescaled_as_torchvisions():
    # Eight GPUs with 128 images, every 32 steps, 600 epochs.
    decay = config_lib.rescaled_ema_decay(
        0.99998, batch_size=1024, every=32, epochs=600
    )
    assert 1 - decay == pytest.approx(2e-5 * 8 * 128 * 32 / 600)


@pytest.mark.parametrize(("text", "value"), [("0.1", 0.1), ("group", "group")])
def test_a_field_that_is_not_overridden_yet_is_answered_with_what_sets_it(text, value):
    config = load("r50")
    flag = f"--config.model.overrides.field={text}"
    with pytest.raises(
        UserError, match=r"model\.overrides sets no field; give"
    ) as told:
        config_lib.check_keys(config, [flag])
    (answer,) = re.findall(r'(--config\.[^=]+=)"(.*)"$', str(told.value))
    before = config.model.overrides.to_dict()
    config_lib.override(config, ["".join(answer)])
    assert config.model.overrides.to_dict() == before | {"field": value}


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("--config.batch_size=512", "batch_size", 512),
        ("--config.model.name=resnet18", "model.name", "resnet18"),
        # What may be a number or a word is either, and needs no quotes.
        ("--config.model.bn_group_size=64", "model.bn_group_size", 64),
        ("--config.model.bn_group_size=device", "model.bn_group_size", "device"),
        # A duration in another unit, and a whole section, take the place of the old.
        ("--config.total.steps=5", "total.steps", 5),
        (
            "--config.model.overrides={'drop_path': 0.1}",
            "model.overrides.drop_path",
            0.1,
        ),
    ],
)
def test_an_override_takes_the_place_of_what_was_there(argument, key, value):
    before, changed = load("r50"), load("r50")
    config_lib.override(changed, [argument])
    path = key.rpartition(".")[0]
    others = {
        name: old
        for name, old in config_lib.flatten(before).items()
        if name != key and not (path in ("total", "model.overrides") and path in name)
    }
    assert config_lib.flatten(changed) == others | {key: value}


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.batch_size=many", "is not a value as 1024"),
        ("--config.total=90", "--config.total=90'"),
        ("--config.batch=5", "Did you mean batch_size"),
        ("batch_size=5", "Overrides are --config.KEY=VALUE"),
    ],
)
def test_an_override_that_cannot_be_is_told(argument, message):
    with pytest.raises(UserError, match=message):
        config_lib.override(load("r50"), [argument])
