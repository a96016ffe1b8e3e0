"""Configs: variants, durations, comparison, and what may change when a run goes on."""

import ast
import contextlib
import functools
import inspect
import json
import pathlib
import runpy
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

import ml_collections
from ml_collections import ConfigDict

from resnet_jax.errors import UserError, nearest

UNITS = ("steps", "epochs", "examples")

# These may differ when a run resumes, since they change no parameter.
MAY_CHANGE = (
    "checkpoint.",
    "evaluate.",
    "log_every.",
    "sharding.",
    "data.cache",
    "data.data_dir",
    "data.eval_size",
    "data.eval_split",
    "data.num_threads",
    "data.num_workers",
    "data.on_bad_image",
)
# These may not where evaluations set the learning rate (`optim.schedule=plateau`).
FOR_PLATEAU = ("evaluate.every.", "evaluate.views", "data.eval_size", "data.eval_split")
# These may where all steps keep their learning rates, or a run is extended.
SETS_RATES = ("optim.schedule", "optim.decay_at", "optim.end_learning_rate")
# `dependencies.py` compares the images and weights that these name.
NAMES = ("data.source", "data.eval_source", "distill.teacher_init", "init_from")


def file_of(path: str) -> str:
    """The file of `FILE.py` or `FILE.py:VARIANT`; raises UserError if there is none."""
    file = path.partition(":")[0]
    if not pathlib.Path(file).is_file():
        folder = pathlib.Path(file).parent
        known = [str(file) for file in sorted(folder.glob("*.py"))]
        hint = nearest(file, known) if known else ""
        raise UserError(f"There is no config {file}.{hint}")
    return file


def load(path: str) -> ConfigDict:
    """The config that a file describes, `FILE.py` or `FILE.py:VARIANT`.

    Raises UserError if there is no such file, or variant, or it is no config.
    """
    file, variant = file_of(path), path.partition(":")[2]
    try:
        get_config = runpy.run_path(file).get("get_config")
    except SyntaxError as error:
        raise UserError(
            f"{file} is no config in Python: line {error.lineno}: {error.msg}."
        ) from None
    if get_config is None:
        raise UserError(f"{file} is no config: it has no function get_config.")
    arguments = [variant] if variant else []
    try:
        inspect.signature(get_config).bind(*arguments)
    except TypeError:
        if variant:
            raise UserError(f"{file} has no variants: leave :{variant} out.") from None
        raise UserError(f"{file} needs a variant: {file}:VARIANT.") from None
    return get_config(*arguments)


def choose(variant: str, known: Collection[str]) -> int:
    """The place of a recipe's argument among those that it knows; else UserError."""
    if variant not in known:
        raise UserError(
            f"The recipe has no variant {variant!r}.{nearest(variant, known)} It is one"
            f" of {', '.join(known)}, behind the file and a colon."
        )
    return list(known).index(variant)


def literal(value) -> ml_collections.FieldReference:
    """A config value whose overrides may have another type, such as 32 or 'global'."""
    return ml_collections.FieldReference(value, field_type=object)


def in_steps(
    duration: ConfigDict | Mapping, batch_size: int, train_size: int, key: str
) -> float:
    """Turns `{'epochs': 90}`, `{'steps': 500}` or `{'examples': 1e6}` into steps.

    `key` is the duration's name in a message. Raises UserError for anything else.
    """
    units = dict(duration)
    if len(units) != 1 or next(iter(units)) not in UNITS:
        raise UserError(
            f"{key}={units} is not a duration; write one of {{'epochs': 90}},"
            " {'steps': 500} or {'examples': 1e6}."
        )
    if batch_size < 1:
        raise UserError(f"batch_size={batch_size} must be at least 1.")
    ((unit, amount),) = units.items()
    if not isinstance(amount, int | float) or amount < 0:
        raise UserError(f"{key}.{unit}={amount!r} is not a number of {unit}.")
    scale = {"steps": 1, "epochs": train_size / batch_size, "examples": 1 / batch_size}
    return float(amount * scale[unit])


def to_steps(
    duration: ConfigDict | Mapping, batch_size: int, train_size: int, key: str
) -> int:
    """As `in_steps`, rounded to whole steps; what is above zero is at least one."""
    steps = in_steps(duration, batch_size, train_size, key)
    return max(round(steps), 1 if steps else 0)


def rescaled_ema_decay(
    decay: float, *, batch_size: int, every: int, epochs: float | int
) -> float:
    """The decay of an average that does not depend on batch size and epochs.

    1 - min(1, (1 - decay) * batch_size * every / epochs), which is what torchvision's
    recipes make of `--model-ema-decay`; `batch_size` is over all devices.
    """
    return 1 - min(1.0, (1 - decay) * batch_size * every / epochs)


def rewrite_durations(argv: list[str]) -> list[str]:
    """Lets `--config.total.steps=5` replace a duration that was given in epochs."""
    rewritten = []
    for argument in argv:
        name, equals, amount = argument.partition("=")
        path, _, unit = name.rpartition(".")
        if path.startswith("--config.") and unit in UNITS and equals:
            argument = f"{path}={{'{unit}': {amount}}}"
        rewritten.append(argument)
    return rewritten


def flatten(config: ConfigDict | Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns {'optim.momentum': 0.9, ...} in alphabetical order.

    A duration keeps its unit in the name; an empty dictionary is a value.
    """
    flat = {}
    for key, value in sorted(config.items()):
        if isinstance(value, ConfigDict | Mapping) and len(value):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def as_text(config: ConfigDict) -> str:
    """One line a key, as kept under `tests/golden/configs/`."""
    return "".join(f"{key} = {value!r}\n" for key, value in flatten(config).items())


def as_json(config: ConfigDict) -> str:
    """The config as it is kept in the workdir."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_saved(saved: Mapping[str, Any]) -> ConfigDict:
    """Returns the config that was saved as JSON, with the types that overrides need.

    A key that the saved config lacks, as it was written by an older version, gets its
    default.
    """
    config = _defaults()
    with config.ignore_type():
        _fill(config, saved)
    return config


def _fill(config: ConfigDict, saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        default = config.get(key)
        is_section = isinstance(default, ConfigDict) and set(default) - set(UNITS)
        if is_section and isinstance(value, Mapping):
            _fill(default, value)
        else:
            config[key] = _as_tuples(value)


def _as_tuples(value: Any) -> Any:
    """Turns the lists of JSON, at any depth, into tuples."""
    if isinstance(value, list):
        return tuple(map(_as_tuples, value))
    if isinstance(value, Mapping):
        return {key: _as_tuples(part) for key, part in value.items()}
    return value


def _defaults() -> ConfigDict:
    from configs import common

    return common.get_config()


def differences(
    old: Mapping, new: ConfigDict, may_differ: Callable[[str], bool] = lambda key: False
) -> list[str]:
    """Returns how two configs differ, as 'key: old -> new' for each key.

    A key that the old one lacks, as it was written by an older version, has the default
    value of `configs/common.py`, which is what the run did.

    Args:
      old: The saved config.
      new: The config to compare with it.
      may_differ: Tells of a key, such as `optim.momentum`, that it is not compared.
    """

    def values(config: ConfigDict) -> dict[str, Any]:
        # Through JSON, where tuples are lists.
        flat = flatten(json.loads(as_json(config)))
        return {key: value for key, value in flat.items() if value != {}}

    flat_old, flat_new = values(from_saved(old)), values(new)
    found = []
    for key in sorted(flat_old.keys() | flat_new.keys()):
        before, after = flat_old.get(key, "nothing"), flat_new.get(key, "nothing")
        if before != after and not may_differ(key):
            found.append(f"{key}: {before!r} -> {after!r}")
    return found


def check_keys(config: ConfigDict, argv: list[str]) -> None:
    """Raises UserError for a `--config.KEY=...` that the config does not have."""
    known = flatten(config)
    for argument in argv:
        name, _, text = argument.partition("=")
        if not name.startswith("--config."):
            continue
        key, node = name.removeprefix("--config."), config
        for part in key.split("."):
            if not isinstance(node, ConfigDict) or part not in node:
                if key.endswith(f".overrides.{part}"):
                    _refuse_override(key, node, text)
                raise UserError(f"The config has no key {key!r}.{nearest(key, known)}")
            node = node[part]


def _refuse_override(key: str, given: ConfigDict, text: str) -> NoReturn:
    where, _, field = key.rpartition(".")
    with contextlib.suppress(ValueError, SyntaxError):
        text = ast.literal_eval(text)
    whole = given.to_dict() | {field: text}
    raise UserError(
        f"The config's {where} sets no {field}; give all that it is to set:"
        f' --config.{where}="{whole}"'
    )


def override(config: ConfigDict, arguments: list[str]) -> None:
    """Carries out `--config.KEY=VALUE` arguments.

    A duration may be given in another unit than it has: `--config.total.steps=5`.

    Raises UserError for any other argument, and for a key that there is not.
    """
    for argument in rewrite_durations(arguments):
        name, equals, text = argument.partition("=")
        if not (name.startswith("--config.") and equals):
            raise UserError(f"What is {argument!r}? Overrides are --config.KEY=VALUE.")
        check_keys(config, [argument])
        *path, last = name.removeprefix("--config.").split(".")
        node = functools.reduce(ConfigDict.__getitem__, path, config)
        value, kind = node[last], node.get_type(last)
        if kind is not str:
            try:
                text = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                # Of any type: a word needs no quotes.
                if kind is not object:
                    raise UserError(
                        f"{argument!r} is not a value as {value!r}."
                    ) from None
        if isinstance(value, ConfigDict) and isinstance(text, dict):
            # The whole of it, not what it had besides.
            text = ConfigDict(text)
        try:
            node[last] = text
        except TypeError as error:
            raise UserError(f"{argument!r}: {error}.") from None


def for_evaluation(config: ConfigDict, devices: int) -> ConfigDict:
    """Returns a config that evaluates the same on any number of devices.

    What only training needs is set to what every network and batch size allows.
    """
    config = ConfigDict(config.to_dict())
    with config.ignore_type():
        batch_size = config.evaluate.batch_size or config.batch_size
        config.batch_size = -(-batch_size // devices) * devices
        config.evaluate.batch_size = 0
        config.model.bn_group_size = "global"
        # Durations in epochs take another number of steps at that batch size.
        config.total = ConfigDict({"steps": 1})
        config.data.resize_schedule = ConfigDict()
        for section in ("optim", "mix", "distill"):
            config[section] = _defaults()[section]
        config.optim.warmup = ConfigDict({"steps": 0})
    return config


def for_dry_run(config: ConfigDict, devices: int) -> ConfigDict:
    """A config that does two steps of everything on fake data at a small size."""
    config = ConfigDict(config.to_dict())
    with config.ignore_type():
        # Two examples a device and microbatch, in groups as a device holds them.
        config.batch_size = 2 * devices * config.optim.microbatches
        config.evaluate.batch_size = 2 * devices
        config.model.bn_group_size = "device"
        # Does not divide into batches, so that the last one is padded.
        config.data.source = f"fake:10:{config.batch_size + 1}"
        config.data.train_split, config.data.eval_split = "train", "validation"
        config.data.eval_source, config.data.shots = "", 0
        config.evaluate.sets = ()
        config.data.image_size = min(config.data.image_size, 64)
        config.data.eval_size = min(config.data.eval_size, 64)
        if config.data.resize_schedule:
            # A step of either size.
            size = config.data.image_size
            times = {"start": {"steps": 0}, "end": {"steps": 1}}
            sizes = {"first": max(size // 2, 1), "last": size}
            config.data.resize_schedule = ConfigDict(times | sizes)
        config.init_from = ""
        config.bn_recompute = min(config.bn_recompute, 1)
        config.total = ConfigDict({"steps": 2})
        if config.optim.warmup and max(config.optim.warmup.values()):
            config.optim.warmup = ConfigDict({"steps": 1})
        config.optim.decay_at = tuple({"steps": 1} for _ in config.optim.decay_at[:1])
        config.optim.schedule_length = ConfigDict()
        if config.distill.teacher:
            config.distill.teacher_init = "drawn"
        for section in (config.evaluate, config.checkpoint):
            section.every = ConfigDict({"steps": 2})
        config.log_every = ConfigDict({"steps": 1})
    return config
