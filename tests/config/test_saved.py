"""Saved configs, compared with those of a resumed run."""

import json

from ml_collections import ConfigDict

from resnet_jax.config.saved import (
    MAY_CHANGE,
    as_json,
    differences,
)
from tests.helpers.golden_configs import load


def test_only_keys_that_change_no_parameter_may_differ_on_a_resume():
    old = json.loads(as_json(load("quickstart")))
    new = load("quickstart")

    def may_change(key: str) -> bool:
        return key.startswith(MAY_CHANGE)

    assert differences(old, new, may_change) == []
    new.data.num_workers = 7
    new.data.on_bad_image = "skip"
    new.data.max_pixels = 10**9
    new.checkpoint.keep_last = 9
    assert differences(old, new, may_change) == []
    new.optim.learning_rate = 0.2
    changed = ["optim.learning_rate: 0.1 -> 0.2"]
    assert differences(old, new, may_change) == changed
    assert len(differences(old, new)) == 5


def test_a_run_older_than_a_key_resumes_with_the_default():
    old = json.loads(as_json(load("quickstart")))
    del old["data"]["policy"], old["data"]["color_jitter"], old["seed"]
    del old["data"]["max_pixels"]
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
