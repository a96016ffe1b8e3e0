"""The table of config keys, and the names with which each key has an effect."""

import functools
import re
import shlex
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax.config import defaults, keys, saved, values
from resnet_jax.data import augment, cache, crops, resize
from resnet_jax.errors import UserError
from resnet_jax.parallel import sharding
from resnet_jax.training import losses, mixup, optim, programs, schedules, validate
from resnet_jax.training.datasets import eval_augment, train_augment
from resnet_jax.training.experiment import set_up
from tests.helpers import pictures, runs, tiny
from tests.helpers.optim_configs import TRAIN_SIZE

KEYS = list(values.default_values())
ROWS = {row[0]: dict(zip(keys.COLUMNS, row, strict=True)) for row in keys.table()}


def names_of(key: str) -> set[str]:
    """Returns the names with which a key has an effect, as the table has them."""
    return set(re.findall(r"\b(?!(?:or|and)\b)[\w.]+", ROWS[key]["only with"]))


def put(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """Sets keys without a check of types, and returns the config."""
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        value = ConfigDict(value) if isinstance(value, dict) else value
        with config.ignore_type():
            (config[section] if section else config)[name] = value
    return config


# The table.


def test_the_table_has_every_key_in_the_order_of_the_defaults():
    assert sorted(ROWS) == sorted(KEYS)
    assert list(ROWS)[:3] == ["seed", "batch_size", "total"]
    assert list(ROWS)[-1] == "checkpoint.keep_best"


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_a_meaning_that_can_be_read_alone(key):
    meaning = ROWS[key]["meaning"]
    assert re.fullmatch(r"[A-Z].*[^.]\.", meaning)
    assert len(meaning.split()) >= 3
    assert "|" not in "".join(ROWS[key].values())
    # Paths and patterns between backticks; elsewhere Markdown would take these signs
    # for its own.
    assert not set("*<[{_`") & set(re.sub(r"`[^`]+`|[a-z\d]_[a-z]", "", meaning))


NAMES = {
    "model.dtype": validate.DTYPES,
    "sharding.params": sharding.PARAMS,
    "data.train_crop": augment.TRAIN_CROPS,
    "data.pad_mode": crops.PAD_MODES,
    "data.erase_mode": augment.ERASE_MODES,
    "data.interpolation": resize.INTERPOLATIONS,
    "data.decode": augment.DECODES,
    "data.cache": cache.MODES,
    "data.on_bad_image": ("stop", "skip"),
    "optim.name": optim.OPTIMIZERS,
    "optim.schedule": schedules.SCHEDULES,
    "optim.momentum_form": optim.MOMENTUM_FORMS,
    "optim.decay": optim.DECAYS,
    "optim.weight_decay_exclude": optim.DECAY_EXCLUDES,
    "data.class_weights": losses.CLASS_WEIGHTS,
    "loss": losses.LOSSES,
    "mix.rule": mixup.RULES,
    "ema_warmup": optim.EMA_WARMUPS,
    "evaluate.views": validate.VIEWS,
}


@pytest.mark.parametrize("key", NAMES)
def test_the_meaning_of_a_key_whose_values_are_names_has_all_of_them(key):
    meaning = ROWS[key]["meaning"]
    for name in NAMES[key]:
        assert re.search(rf"(?<![\w+]){re.escape(name or 'empty')}(?![\w+])", meaning)


@pytest.mark.parametrize("key", KEYS)
def test_a_default_is_written_as_on_a_command_line(key):
    config = defaults.get_config()
    (argument,) = shlex.split(f"--config.{key}={ROWS[key]['default']}")
    config_lib.override(config, [argument])
    assert config.to_dict() == defaults.get_config().to_dict()


# Values of each kind, one of which is in the range of every key.
SAMPLES = {
    "True or False": [True],
    "whole number": [0, 1],
    "number": [0.5],
    "text": ["x", "chip", "global"],
    "duration": [{"epochs": 1}],
    "dictionary": [{"depth": 1}],
    "empty dictionary": [{}],
}
# The kinds that a type of the table includes.
KINDS = {
    "number": {"number", "whole number"},
    "dictionary": {"dictionary", "duration", "empty dictionary"},
    "duration or empty dictionary": {"duration", "empty dictionary"},
    # Of its names, which are those of figures, the samples have none.
    "dictionary of numbers": {"empty dictionary"},
    "dictionary or text": {"dictionary", "duration", "empty dictionary", "text"},
    "True, False or text": {"True or False", "text"},
    "text or whole number": {"text", "whole number"},
}


@pytest.mark.parametrize("key", KEYS)
def test_a_key_takes_the_values_of_its_type_and_no_others(key):
    def is_taken(value: object) -> bool:
        try:
            values.check_value(key, value)
        except UserError:
            return False
        return True

    kind, *limits = re.split(", (?=at|from|more|each)", ROWS[key]["type"])
    taken = {name for name in SAMPLES if any(map(is_taken, SAMPLES[name]))}
    if kind.startswith("tuple of "):
        assert not taken
        assert is_taken(values.default_values()[key])
    else:
        expected = KINDS.get(kind, {kind})
        if key == "data.eval_fraction":
            # No whole number is between 0 and 1.
            expected = expected - {"whole number"}
        assert taken == expected
    assert bool(limits) == (key in values.RANGES and key != "data.mean")


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("seed", "whole number, from 0 to 4,294,967,295"),
        ("optim.momentum", "number, at least 0 and less than 1"),
        ("data.scale", "tuple of 2 numbers, each more than 0 and at most 1"),
        ("data.mean", "tuple of numbers"),
        ("optim.decay_at", "tuple of durations"),
        ("total", "duration or empty dictionary"),
        ("optim.warmup", "duration"),
    ],
)
def test_a_type_is_a_phrase_with_the_range(key, kind):
    assert ROWS[key]["type"] == kind


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_keys():
    with pytest.raises(UserError, match=r"'optim\.momentm'.*mean optim\.momentum"):
        keys.table(["seed", "optim.momentm"])


def test_several_patterns_give_the_keys_of_each_in_their_order():
    rows = keys.table(["mix.*", "seed", "mix.rule"])
    assert [row[0] for row in rows] == [
        *("mix.mixup_alpha", "mix.cutmix_alpha", "mix.probability"),
        *("mix.switch_probability", "mix.rule", "seed"),
    ]


def test_the_command_imports_no_numerical_library_and_prints_paragraphs():
    module = ("-X", "importtime", "-m", "resnet_jax.keys", "optim.nest*", "data.pad")
    code, output = runs.run_python(*module)
    lines = output.splitlines()
    imported = {
        line.rpartition("|")[2].strip() for line in lines if line.startswith("import")
    }
    assert "resnet_jax.config.keys" in imported
    assert not imported & {"jax", "flax", "numpy", "cv2"}
    assert code == 0
    assert [line for line in lines if not line.startswith("import")] == [
        "optim.nesterov=True  (True or False)",
        "    Uses Nesterov momentum. Only with sgd or lars.",
        "data.pad=4  (whole number, at least 0)",
        "    Number of pixels that are added on each side. Only with pad.",
    ]


def test_the_page_of_the_config_has_a_row_of_each_key():
    page = (runs.ROOT / "docs/config.md").read_text()
    listed = re.findall(r"^\| `([a-z_.]+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(KEYS)


def test_the_page_of_checkpoints_has_the_keys_that_may_change():
    page = (runs.ROOT / "docs/checkpoints.md").read_text()
    section = page.partition("\n## What may change when")[2].partition("\n## ")[0]
    named = re.findall(r"`([a-z_.]+)[`=]", section)
    changeable = (*saved.MAY_CHANGE, *saved.NAMES, *saved.SETS_RATES, "total.")
    for beginning in changeable:
        assert any(f"{key}.".startswith(beginning) for key in named), beginning
    beginnings = tuple(key.rstrip(".") for key in changeable)
    assert [key for key in named if not key.startswith(beginnings)] == []


# The names with which a key has an effect.

# Other values than those of the configs below, at least one of which has an effect
# wherever the key is read.
OTHERS: dict[str, tuple] = {
    "data.image_size": (24,),
    "data.scale": ((0.5, 0.6),),
    "data.ratio": ((1.0, 1.1),),
    "data.pad": (8,),
    "data.pad_mode": ("reflect",),
    "data.short_side": ((33, 36),),
    "data.flip": (False,),
    "data.policy": ("trivial_wide",),
    "data.color_jitter": ((0.4, 0.4, 0.4, 0.1),),
    "data.lighting": (0.5,),
    "data.erase": (1.0,),
    "data.erase_mode": ("pixel",),
    "data.erase_count": (5,),
    "data.colout": (0.2,),
    "data.crop_fraction": (0.5,),
    "data.interpolation": ("bicubic",),
    "data.decode": ("exact",),
    "data.mean": ((0.1, 0.1, 0.1),),
    "data.std": ((0.9, 0.9, 0.9),),
    "optim.learning_rate": (0.3,),
    "optim.head_learning_rate": (0.5,),
    "optim.freeze": ("up_to_stem",),
    "optim.freeze_until": ({"steps": 0},),
    "optim.learning_rate_batch": (128,),
    "optim.schedule_length": ({"steps": 30},),
    "optim.end_learning_rate": (0.02,),
    "optim.power": (3.0,),
    "optim.decay_at": (({"steps": 25},),),
    "optim.decay_factor": (0.5,),
    "optim.patience": (1,),
    "optim.per_epoch": (True,),
    "optim.warmup": ({"steps": 8},),
    "optim.warmup_from": (0.05,),
    "optim.warmup_prefix": (False,),
    "optim.momentum": (0.5,),
    "optim.nesterov": (False,),
    "optim.momentum_form": ("torch", "caffe"),
    "optim.betas": ((0.5, 0.9),),
    "optim.eps": (0.1,),
    "optim.weight_decay": (0.01,),
    "optim.decay": optim.DECAYS,
    "optim.weight_decay_exclude": ("norm+bias",),
    "optim.layer_decay": (0.5,),
    "optim.clip_norm": (0.01,),
    "optim.agc": (0.01,),
    "optim.sam_rho": (0.1,),
    "optim.sam_every": (2,),
    "optim.microbatches": (2,),
    "data.class_weights": ("inverse_frequency", "effective_number"),
    "data.class_weights_beta": (0.5,),
    "label_smoothing": (0.1,),
    "bce_target_threshold": (0.2,),
    "bce_sum_classes": (True,),
    "mix.probability": (0.5,),
    "mix.switch_probability": (0.1,),
    "mix.rule": ("torchvision",),
    "distill.overrides": ({"stage_sizes": (1, 1, 1)},),
    "distill.weight": (0.1,),
    "distill.temperature": (2.0,),
    "ema_every": (2,),
    "ema_warmup": ("none",),
}


def updates_of(name: str, changes: dict[str, Any]) -> np.ndarray:
    """Returns the updates of three steps of an optimiser, whose rate changes."""
    config = defaults.get_config()
    decay = "coupled" if optim.OPTIMIZERS[name].coupled else "decoupled"
    base = {"optim.name": name, "optim.decay": decay, "optim.weight_decay": 0.1}
    put(config, base | changes)
    rates = optax.linear_schedule(0.1, 0.02, 3)
    optimizer = optim.make_optimizer(config, rates)
    shapes = {
        "stem_conv1": {"kernel": (3, 3, 1, 2)},
        "stage1_block1": {"norm1": {"scale": (2,), "bias": (2,)}},
        "head": {"kernel": (2, 3), "bias": (3,)},
    }

    def draw(seed: int):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32),
            shapes,
            is_leaf=lambda leaf: isinstance(leaf, tuple),
        )

    params, found = draw(0), []
    state = optimizer.init(params)
    for step in range(3):
        updates, state = optimizer.update(draw(step + 1), state, params)
        params = optax.apply_updates(params, updates)
        found += map(np.ravel, jax.tree.leaves(updates))
    return np.concatenate(found)


def rates_of(schedule: str, changes: dict[str, Any]) -> np.ndarray:
    """Returns the learning rates of the steps of four epochs."""
    base = {
        "optim.schedule": schedule,
        "optim.warmup": {"steps": 4},
        "optim.decay_at": ({"steps": 20}, {"steps": 30}),
        "optim.end_learning_rate": 0.01,
        "optim.patience": 3,
    }
    config = put(defaults.get_config(), base | changes)
    rate = schedules.make_schedule(config, total_steps=40, train_size=TRAIN_SIZE)
    # A constant schedule gives one number for all steps.
    rates = np.array(jnp.broadcast_to(rate(jnp.arange(40)), (40,)))
    if schedule == "plateau":
        plateau, memory = schedules.Plateau(config.optim), None
        for step in range(40):
            memory = plateau.after(memory, 0.5)
            rates[step] *= memory["factor"]
    return rates


def pixels_of(crop: str, changes: dict[str, Any]) -> np.ndarray:
    """Returns the pixels of random crops of an image, or of its evaluation."""
    base = {"data.image_size": 32, "data.short_side": (40, 60)}
    if crop != "evaluation":
        base["data.train_crop"] = crop
    config = put(defaults.get_config(), base | changes)
    augmentation = train_augment(config)
    if crop == "evaluation":
        augmentation = eval_augment(config, config.data.crop_fraction)
    image = pictures.noise(0, 80, 60)
    return np.stack([augmentation(pictures.picture(image), key) for key in range(8)])


def loss_of(loss: str, changes: dict[str, Any]) -> np.ndarray:
    """Returns the losses of two examples with mixed labels."""
    config = put(defaults.get_config(), {"loss": loss} | changes)
    losses.check(config)
    logits = jnp.array([[1.0, -2.0, 0.5], [0.0, 1.0, 2.0]])
    labels = jnp.array([[0.7, 0.3, 0.0], [0.0, 0.1, 0.9]])
    weights = {}
    if rule := config.data.class_weights:
        counts, beta = np.array([9.0, 3.0, 1.0]), config.data.class_weights_beta
        weights = {"class_weights": losses.class_weights(counts, rule, beta)}
    return np.asarray(losses.make_loss(config)(logits, labels, **weights))


@functools.cache
def usual(result: Callable, name: str) -> np.ndarray:
    """Returns a result without changes."""
    return result(name, {})


def has_effect(result: Callable, name: str, key: str, base: dict[str, Any]) -> bool:
    """Tells whether another value of a key changes a result; an error is none."""
    before = result(name, base) if base else usual(result, name)
    for value in OTHERS[key]:
        try:
            after = result(name, base | {key: value})
        except UserError:
            continue
        if not np.array_equal(before, after):
            return True
    return False


RESULTS: tuple[tuple[Callable, Iterable[str], str], ...] = (
    (updates_of, optim.OPTIMIZERS, "optim."),
    (rates_of, schedules.SCHEDULES, "optim."),
    (pixels_of, augment.TRAIN_CROPS, "data."),
    (loss_of, losses.LOSSES, "(loss|label|bce|data.class_weights$)"),
)
CASES = [
    pytest.param(result, set(names), key, id=f"{result.__name__}-{key}")
    for result, names, section in RESULTS
    for key in OTHERS
    if re.match(section, key)
]


@pytest.mark.slow
@pytest.mark.parametrize(("result", "names", "key"), CASES)
def test_a_key_has_an_effect_with_exactly_the_names_of_the_table(result, names, key):
    affected = {name for name in names if has_effect(result, name, key, {})}
    named = names_of(key)
    if named & names:
        assert affected == named & names
    elif named - set(KEYS):
        # A key of some schedules, for instance, has no effect on any optimiser.
        assert not affected
    else:
        assert affected in (set(), names)


def test_evaluations_read_the_keys_that_name_them():
    named = {key for key in KEYS if "evaluation" in names_of(key)}
    assert named == {"data.crop_fraction"}
    assert has_effect(pixels_of, "evaluation", "data.crop_fraction", {})


def test_every_key_that_may_depend_on_a_name_is_tested():
    fields = {f"data.{name}" for name in augment.Augment.__dataclass_fields__}
    expected = {key for key in KEYS if key.startswith("optim.") or key in fields}
    expected |= {key for key in KEYS if names_of(key)}
    # The names themselves; and weights, without which a teacher is an error.
    selecting = {"optim.name", "optim.schedule", "distill.teacher_init"}
    assert expected - selecting <= set(OTHERS)


# Values of keys on which others depend.
ON: dict[str, Any] = {
    "data.class_weights": "effective_number",
    "data.erase": 1.0,
    "optim.warmup": {"steps": 4},
    "optim.freeze": "all_but_head",
    "optim.sam_rho": 0.05,
    "mix.mixup_alpha": 0.2,
    "mix.cutmix_alpha": 1.0,
    "distill.teacher": "cifar_resnet20",
    "ema_decay": 0.9,
}
OFF = {
    key: {"steps": 0} if key == "optim.warmup" else values.default_values()[key]
    for key in ON
}


@functools.cache
def program_of(frozen: tuple[tuple[str, Any], ...]) -> str:
    """Returns the lowered train step of a small run with some changes."""
    changes = {key: _thawed(value) for key, value in frozen}
    if changes.get("distill.teacher"):
        changes["distill.teacher_init"] = "drawn"
    experiment = set_up(put(tiny.config(), changes), tiny.mesh_of(1))
    teacher = programs.teacher_like(experiment) if experiment.teacher else None
    return programs.lower_train_step(experiment, teacher).as_text()


def _thawed(value: Any) -> Any:
    return dict(value) if isinstance(value, frozenset) else value


def text_of(name: str, changes: dict[str, Any]) -> str:
    """Returns the result of `program_of`; `name` is not used."""
    del name
    pairs = {
        key: frozenset(value.items()) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    return program_of(tuple(sorted(pairs.items())))


def result_that_reads(key: str) -> tuple[Callable, str]:
    """Returns the function whose result depends on a key, and its first argument."""
    if key.startswith("data.class_weights"):
        return loss_of, "cross_entropy"
    if key.startswith("data."):
        return pixels_of, "center"
    if key.startswith("optim.warmup"):
        return rates_of, "constant"
    return text_of, ""


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in OTHERS if names_of(key) & set(KEYS)])
def test_a_key_has_an_effect_only_with_the_keys_of_the_table(key):
    result, name = result_that_reads(key)
    others = sorted(names_of(key))
    assert set(others) <= set(ON)
    assert not has_effect(result, name, key, OFF)
    alone = [has_effect(result, name, key, OFF | {x: ON[x]}) for x in others]
    if " and " in ROWS[key]["only with"]:
        assert not any(alone)
        assert has_effect(result, name, key, OFF | {x: ON[x] for x in others})
    else:
        assert all(alone)


def test_a_teacher_and_its_weights_are_set_together():
    assert names_of("distill.teacher_init") == {"distill.teacher"}
    config = put(defaults.get_config(), {"distill.teacher_init": "drawn"})
    with pytest.raises(UserError, match=r"distill\.teacher='' and distill\.teacher_in"):
        losses.check(config)


def test_every_name_with_which_a_key_has_an_effect_is_known():
    known = {"evaluation", *KEYS}
    for _, names, _ in RESULTS:
        known |= set(names)
    assert {name for key in KEYS for name in names_of(key)} <= known
