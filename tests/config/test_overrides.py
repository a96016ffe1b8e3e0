"""Overrides of config keys on the command line."""

import re

import pytest

from resnet_jax import config as config_lib
from resnet_jax.config.saved import (
    flatten,
)
from resnet_jax.errors import UserError
from tests.helpers.golden_configs import load


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
        ("--config.model.fused_norm=TRUE", "model.fused_norm", True),
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
    flags = ["--config.data.num_workers", "-1", "--config.data.flip"]
    config_lib.override(config, [*flags, "--config.batch_size=8"])
    data = config.data
    assert (data.num_workers, data.flip, config.batch_size) == (-1, True, 8)


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
        ("--config.model.overrides={1: 2}", r"overrides has the key 1, which is not"),
        ("--config.model.overrides={'a.b': 2}", r"overrides has the key 'a\.b'"),
        ("--config.model.overrides={[]: 2}", "is not a dictionary"),
        ("--config.model.overrides={'alpha': 1e999}", r"alpha=inf is not a finite"),
        (
            "--config.optim.learning_rate=-0.1",
            r"rate=-0\.1 must be at least 0",
        ),
        (f"--config.optim.learning_rate=1{'0' * 400}", "is not a number"),
        ("--config.optim.warmup={'epochs': 1e999}", r"warmup\.epochs=inf is not"),
        ("--config.optim.warmup.steps=-1", r"optim\.warmup\.steps=-1 is not a number"),
        ("--config.optim.decay_at=({'epochs': -3},)", r"decay_at\.epochs=-3 is not"),
        ("--config.data.mean=(0.5, 1e999, 0.5)", r"data\.mean=inf must be at most"),
        (
            "--config.seed=4294967296",
            r"seed=4294967296 must be from 0 to",
        ),
        ("--config.seed=-1", "seed=-1 must be from 0 to"),
        ("--config.batch_size=1e30", "must be at most 16,777,216"),
        ("--config.model.fused_norm=maybe", "is not True, False or 'chip'"),
        ("--config.total.days=9", "no key 'total.days'"),
        ("--config.seed.x=9", "no key 'seed.x'"),
        ("--config.batch=5", "Did you mean batch_size"),
        ("batch_size=5", "Overrides are written --config.KEY=VALUE"),
    ],
)
def test_an_illegal_override_is_an_error_that_says_why(argument, message):
    with pytest.raises(UserError, match=message):
        config_lib.override(load("r50"), [argument])
