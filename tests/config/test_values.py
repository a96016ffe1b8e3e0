"""The values that each key may have, wherever they come from."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax.config import defaults, values
from resnet_jax.config.saved import as_json
from resnet_jax.errors import UserError

NAN, INF = float("nan"), float("inf")
# What somebody may write by mistake.
MISTAKES = (
    *(-1, 0, 2.5, NAN, INF, -INF, 1e30, 1e300, 2**31, 2**63, 10**400, True, None, ""),
    *("x", "1e-3", "\0", b"x", (), [1], (1, 1), (NAN, NAN, NAN), ("x",), object()),
    *(10**5000, {"steps": 10**5000}, {"epochs": "x" * 5000}, "x" * 5000, [1] * 5000),
    *({}, {"epochs": 1}, {"steps": -1}, {"a": NAN}, {"a b": 1}, {1: 2}),
    *(np.float32(1), np.int64(1), np.float64(0.5), np.array([1, 2]), np.bool_(True)),
)


def put(config: ConfigDict, key: str, value: object) -> None:
    """Sets a key as a config file may, without a check of its type."""
    section, _, name = key.rpartition(".")
    with config.ignore_type():
        (config[section] if section else config)[name] = value


def test_every_number_has_a_range_and_every_range_belongs_to_a_key():
    numbers = {
        key
        for key, default in values.default_values().items()
        if isinstance(np.ravel(default)[:1].tolist(), list)
        and np.asarray(default).dtype.kind in "if"
        and np.size(default)
    }
    assert numbers == set(values.RANGES)


def test_the_defaults_are_in_their_ranges():
    values.check(defaults.get_config())


@pytest.mark.parametrize("key", values.default_values())
def test_a_value_is_either_recordable_or_an_error_that_names_its_key(key):
    for mistake in MISTAKES:
        try:
            values.check_value(key, mistake)
        except UserError as error:
            assert str(error).startswith(key), (mistake, error)
            assert "\n" not in str(error), mistake
            assert len(str(error)) < 500, error
        else:
            config = defaults.get_config()
            put(config, key, mistake)
            values.check(config)
            json.dumps(json.loads(as_json(config)), allow_nan=False)


@pytest.mark.parametrize(
    "key", [key for key in values.RANGES if np.ndim(values.default_values()[key]) == 0]
)
def test_a_flag_and_a_config_file_accept_the_same_numbers(key):
    def is_accepted(check, *arguments) -> bool:
        try:
            check(*arguments)
        except UserError:
            return False
        return True

    is_whole = isinstance(values.default_values()[key], int)
    for number in (-1, 0, 1, 0.5, 1.5, 1e30, 2**24, 2**31 - 1, 2**31, 2**32, 2**63):
        # A flag may write 1e30 for a whole number.
        value = int(number) if is_whole and number == 1e30 else number
        flag = f"--config.{key}={number!r}"
        config = defaults.get_config()
        by_flag = is_accepted(config_lib.override, config, [flag])
        assert is_accepted(values.check_value, key, value) == by_flag, number


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", -1, r"^seed=-1 must be from 0 to 4,294,967,295\.$"),
        ("seed", 2**32, r"^seed=4294967296 must be from 0 to 4,294,967,295\.$"),
        ("seed", True, r"^seed=True is not a whole number\.$"),
        ("batch_size", 2**31, r"must be at most 16,777,216\.$"),
        ("optim.learning_rate", -0.1, r"learning_rate=-0\.1 must be at least 0\.$"),
        ("data.pad", 2**31, r"data\.pad=2147483648 must be at most 32,768\.$"),
        ("precise_bn", 2**31, r"precise_bn=2147483648 must be at most 2,147,483,647"),
        ("optim.learning_rate", NAN, r"learning_rate=nan is not a number\.$"),
        ("optim.learning_rate", np.float32(0.1), r"float32\(0\.1\) is not a number"),
        ("optim.learning_rate", "1e-3", r"learning_rate='1e-3' is not a number\.$"),
        ("optim.layer_decay", 0.0, r"layer_decay=0\.0 must be more than 0 and at most"),
        ("optim.sam_rho", -0.1, r"sam_rho=-0\.1 must be at least 0"),
        ("optim.sam_every", 0, r"sam_every=0 must be at least 1"),
        ("optim.momentum", 1.0, r"momentum=1\.0 must be at least 0 and less than 1"),
        ("optim.betas", (0.9, 1.0), r"betas=1\.0 must be at least 0 and less than 1"),
        ("optim.betas", (0.9,), r"betas=\(0\.9,\) must have 2 entries"),
        ("optim.decay_at", ({"epochs": NAN},), r"decay_at\.epochs=nan is not a number"),
        ("label_smoothing", 1.5, "label_smoothing=1.5 must be from 0 to 1"),
        ("distill.weight", 2.0, r"distill\.weight=2\.0 must be from 0 to 1"),
        ("distill.temperature", 0.0, r"temperature=0\.0 must be more than 0"),
        ("data.std", (0.2, 0.0, 0.2), r"data\.std=0\.0 must be more than 0"),
        ("data.scale", (1.0, 0.5), r"data\.scale=\(1\.0, 0\.5\) must be a smallest"),
        ("data.num_workers", 10**6, r"num_workers=1000000 must be at most 4,096"),
        ("data.flip", 1, r"data\.flip=1 is neither True nor False"),
        ("data.flip", "true", r"data\.flip='true' is neither True nor False"),
        ("data.source", None, r"data\.source=None is not a string"),
        ("total", None, r"total=None is not a duration"),
        ("total", 90, r"total=90 is not a duration"),
        ("evaluate.every", {"epochs": INF}, r"evaluate\.every\.epochs=inf is not"),
        ("evaluate.sets", "imagenet_a", r"sets='imagenet_a' is not a tuple"),
        ("model.overrides", {"alpha": NAN}, r"overrides\.alpha=nan is not a finite"),
        ("model.overrides", {"alpha": np.int64(1)}, r"overrides\.alpha=np\.int64\(1\)"),
        ("model.bn_group_size", "gloabl", "bn_group_size='gloabl' is neither a number"),
        ("model.bn_group_size", "32", "bn_group_size='32' is neither a number"),
        ("model.bn_group_size", 32.0, "bn_group_size=32.0 is neither a number"),
        ("model.bn_group_size", None, "bn_group_size=None is neither a number"),
        ("model.bn_group_size", True, "bn_group_size=True is not a whole number"),
        ("model.bn_group_size", {"steps": 1}, r"bn_group_size=\{'steps': 1\} is neit"),
        ("optim.warmup", {"epochs": 10**5000}, "epochs=<int with too many digits> is"),
        ("compiler_options", "none", "compiler_options='none' is not a dictionary"),
    ],
)
def test_an_illegal_value_is_an_error_that_says_what_is_legal(key, value, message):
    config = defaults.get_config()
    put(config, key, value)
    with pytest.raises(UserError, match=message):
        values.check(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 2**32 - 1),
        ("optim.learning_rate", 0),
        ("optim.learning_rate", np.float64(0.1)),
        ("data.mean", [0.5, 0.5, 0.5]),
        ("checkpoint.every", {"steps": 0}),
        ("model.fused_norm", False),
        ("model.overrides", {"stage_sizes": [1, 1], "attention": None}),
        ("compiler_options", {}),
    ],
)
def test_a_legal_value_may_be_written_in_several_ways(key, value):
    config = defaults.get_config()
    put(config, key, value)
    values.check(config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.std", (1e-45,), "at least 1.2e-38"),
        ("mix.mixup_alpha", 1e-300, "at least 1.2e-38"),
        ("distill.temperature", 1e-40, "at least 1.2e-38"),
        ("ema_decay", 0.9999999999999999, "take it for 1"),
        ("optim.betas", (0.9, 0.99999999999), "take it for 1"),
        ("optim.momentum", 0.99999999, "take it for 1"),
    ],
)
def test_a_number_that_float32_takes_for_another_is_an_error(key, value, message):
    with pytest.raises(UserError, match=f"^{key}=.*{message}"):
        values.check_value(key, value)


@pytest.mark.parametrize("name", ["first", "last", "multiple"])
@pytest.mark.parametrize("value", ["a", None, 1.5, True, (1, 2), {"a": 1}, 0, 2**40])
def test_the_sizes_of_progressive_resizing_are_whole_numbers(name, value):
    key = "data.resize_schedule"
    with pytest.raises(UserError, match=f"^{key}.{name}="):
        values.check_value(key, {"first": 4, "last": 8} | {name: value})


@pytest.mark.parametrize("key", ["optim", "optim.momentum", "data.mean", "seed"])
def test_a_config_that_lacks_a_key_is_an_error_that_names_it(key):
    config = defaults.get_config()
    section, _, name = key.rpartition(".")
    with config.unlocked():
        del (config[section] if section else config)[name]
    with pytest.raises(UserError, match=rf"no key {key}.*get_config\(\)"):
        values.check(config)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.optim.learning_rate = -1.0", "learning_rate=-1.0 must be at least 0"),
        ("config.optim.momentum = float('nan')", "momentum=nan is not a number"),
        ("config.seed = None", "seed=None is not a whole number"),
        ("config.total = {'epochs': float('inf')}", r"total\.epochs=inf is not"),
    ],
)
def test_the_error_of_a_config_file_names_the_file(line, message, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from resnet_jax.config import defaults\n"
        "def get_config():\n"
        "    config = defaults.get_config()\n"
        f"    {line}\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match=rf"mine\.py: .*{message}"):
        config_lib.load(path)
