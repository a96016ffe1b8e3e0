"""The values that each key of a config may have, and their check.

A config from a file, from the command line, from Python or from a checkpoint passes the
same check. Keys whose values are names, such as `optim.name`, are compared with the
known names where these are defined.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from resnet_jax.config import defaults, durations
from resnet_jax.config.saved import is_section
from resnet_jax.errors import UserError, nearest, shown

# Devices compute with int32 and float32.
MOST_WHOLE = 2**31 - 1
MOST = 3e38
# Devices take smaller ones for 0, and decay rates that are nearer to 1 for 1.
LEAST = 1.2e-38
NEAREST_TO_1 = 1 - 6e-8
# More images in a step than data sets have, of which every process lists its own.
MOST_IMAGES = 2**24
# More than the side of any image that Pillow decodes by default.
MOST_PIXELS = 2**15
# More than cover an image.
MOST_RECTANGLES = 1000
# More processes, or threads in each, than machines run.
MOST_WORKERS = 2**12


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a key may have, or that each entry of a tuple may have.

    Attributes:
      low: The smallest number.
      high: The largest number that makes sense; None if there is none.
      above: True if numbers have to be more than `low`.
      below: True if numbers have to be less than `high`.
      length: The number of entries of a tuple; None for any number of them.
      ascending: True if the entries are a smallest and a largest number.
      most: The largest number that the program can handle; None for the largest that
        devices compute with.
    """

    low: float | int
    high: float | int | None = None
    above: bool = False
    below: bool = False
    length: int | None = None
    ascending: bool = False
    most: int | None = None

    def holds(self, number: float | int, most: float | int) -> bool:
        """Tells whether a number is in the range, whose largest one may be `most`."""
        high = most if self.high is None else self.high
        is_high_enough = number > self.low if self.above else number >= self.low
        is_low_enough = number < high if self.below else number <= high
        return bool(is_high_enough and is_low_enough)

    def __str__(self) -> str:
        low = f"{'more than' if self.above else 'at least'} {self.low:,}"
        if self.high is None:
            return low
        if not self.above and not self.below:
            return f"from {self.low:,} to {self.high:,}"
        return f"{low} and {'less than' if self.below else 'at most'} {self.high:,}"


ANY = Range(-MOST)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
FROM_1 = Range(1)
FRACTION = Range(0, 1)
DECAY_RATE = Range(0, 1, below=True)
RANGES = {
    # jax.random.key takes 32 bits.
    "seed": Range(0, 2**32 - 1),
    "batch_size": Range(1, most=MOST_IMAGES),
    "model.bn_group_size": FROM_1,
    "data.eval_fraction": Range(0, 1, above=True, below=True),
    "data.shots": NOT_NEGATIVE,
    "data.class_weights_beta": DECAY_RATE,
    "data.image_size": Range(0, most=MOST_PIXELS),
    "data.channels": NOT_NEGATIVE,
    "data.mean": ANY,
    "data.std": POSITIVE,
    "data.scale": Range(0, 1, above=True, length=2, ascending=True),
    "data.ratio": Range(0, above=True, length=2, ascending=True),
    "data.pad": Range(0, most=MOST_PIXELS),
    "data.short_side": Range(1, length=2, ascending=True, most=MOST_PIXELS),
    "data.color_jitter": Range(0, length=4),
    "data.lighting": NOT_NEGATIVE,
    "data.erase": FRACTION,
    "data.erase_count": Range(1, most=MOST_RECTANGLES),
    "data.colout": FRACTION,
    "data.repeats": FROM_1,
    "data.eval_size": Range(0, most=MOST_PIXELS),
    "data.crop_fraction": FRACTION,
    "data.num_workers": Range(-1, most=MOST_WORKERS),
    "data.num_threads": Range(0, most=MOST_WORKERS),
    "data.max_pixels": Range(1, most=2**63 - 1),
    "optim.learning_rate": NOT_NEGATIVE,
    "optim.head_learning_rate": NOT_NEGATIVE,
    "optim.learning_rate_batch": NOT_NEGATIVE,
    "optim.end_learning_rate": NOT_NEGATIVE,
    "optim.power": NOT_NEGATIVE,
    "optim.decay_factor": NOT_NEGATIVE,
    "optim.patience": NOT_NEGATIVE,
    "optim.warmup_from": NOT_NEGATIVE,
    "optim.momentum": DECAY_RATE,
    "optim.betas": Range(0, 1, below=True, length=2),
    "optim.eps": NOT_NEGATIVE,
    "optim.weight_decay": NOT_NEGATIVE,
    "optim.layer_decay": Range(0, 1, above=True),
    "optim.clip_norm": NOT_NEGATIVE,
    "optim.agc": NOT_NEGATIVE,
    "optim.sam_rho": NOT_NEGATIVE,
    "optim.sam_every": FROM_1,
    "optim.microbatches": FROM_1,
    "label_smoothing": FRACTION,
    "bce_target_threshold": FRACTION,
    "mix.mixup_alpha": NOT_NEGATIVE,
    "mix.cutmix_alpha": NOT_NEGATIVE,
    "mix.probability": FRACTION,
    "mix.switch_probability": FRACTION,
    "distill.weight": FRACTION,
    "distill.temperature": POSITIVE,
    "ema_decay": DECAY_RATE,
    "ema_every": FROM_1,
    "precise_bn": NOT_NEGATIVE,
    "evaluate.batch_size": Range(0, most=MOST_IMAGES),
    "stop.patience": NOT_NEGATIVE,
    "checkpoint.keep_last": FROM_1,
    "checkpoint.keep_best": NOT_NEGATIVE,
}
# The sizes in data.resize_schedule, which is empty by default.
RESIZE_SIZES = {"first", "last", "multiple"}
RESIZE_SIZE = Range(1, most=MOST_PIXELS)
# The figures in stop.target, which is empty by default.
TARGETS = {"top1": FRACTION, "top5": FRACTION, "loss": NOT_NEGATIVE}
# Keys whose values are those of the initial weights where they are empty or 0
# (`training/completion.py`).
BY_WEIGHTS = (
    *("model.name", "data.image_size", "data.channels", "data.mean", "data.std"),
    *("data.interpolation", "data.crop_fraction"),
)
DURATIONS = ("total", "log_every", "optim.warmup", "evaluate.every", "checkpoint.every")
OPTIONAL_DURATIONS = ("optim.schedule_length", "optim.freeze_until")


def check(config: ConfigDict) -> None:
    """Checks each value of a config by itself.

    `training/validate.py` also compares values with each other and with the devices.

    Args:
      config: The config. Keys that the defaults do not have are not checked.

    Raises:
      UserError: A key is missing, or its value has another type or is out of its range.
    """
    for key in default_values():
        value: Any = config
        for part in key.split("."):
            if not isinstance(value, ConfigDict) or part not in value:
                raise UserError(
                    f"The config has no key {key}. Start from"
                    " resnet_jax.config.defaults.get_config(), which has all keys."
                )
            value = value[part]
        check_value(key, value)


def check_value(key: str, value: Any) -> None:
    """Checks the value of one key.

    Args:
      key: The key, such as `optim.momentum`, or one that the defaults do not have, of
        which everything is allowed.
      value: The value.

    Raises:
      UserError: The value has another type than the default, or is out of the range
        that `RANGES` has for the key.
    """
    default = default_values().get(key)
    if default is None:
        return
    if isinstance(value, ConfigDict):
        # Its text in messages has a line for each entry.
        value = value.to_dict()
    if key == "total":
        is_empty = isinstance(value, Mapping) and not value
        if not is_empty:
            durations.parse(value, key)
    elif key in OPTIONAL_DURATIONS:
        _check_dictionary(key, value)
        if value:
            durations.parse(value, key)
    elif key in DURATIONS:
        durations.parse(value, key)
    elif key == "data.resize_schedule":
        _check_dictionary(key, value)
        # Its other entries are checked where they become steps.
        for name in RESIZE_SIZES & set(value):
            _check_numbers(f"{key}.{name}", value[name], 1, RESIZE_SIZE)
    elif key == "stop.target":
        if not isinstance(value, Mapping):
            raise UserError(f"{key}={shown(value)} is not a dictionary.")
        for name in value:
            if name not in TARGETS:
                hint = nearest(str(name), TARGETS)
                raise UserError(f"{key} has no figure {shown(name)}.{hint}")
            _check_numbers(f"{key}.{name}", value[name], 1.0, TARGETS[name])
    elif key == "optim.decay_at":
        for duration in _entries(key, value):
            durations.parse(duration, key)
    elif key == "model.bn_group_size" and not isinstance(value, int):
        if not _is_word(value, "global", "device"):
            raise UserError(
                f"{key}={shown(value)} is neither a number of examples nor 'global' nor"
                " 'device'."
            )
    elif key in RANGES:
        _check_numbers(key, value, default, RANGES[key])
    elif key == "model.fused_norm":
        if not isinstance(value, bool) and not _is_word(value, "chip"):
            raise UserError(f"{key}={shown(value)} is not True, False or 'chip'.")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{key}={shown(value)} is neither True nor False.")
    elif key == "compiler_options":
        if not _is_word(value, "chip"):
            _check_dictionary(key, value)
    elif isinstance(default, str):
        _check_word(key, value)
    elif isinstance(default, tuple):
        for word in _entries(key, value):
            _check_word(key, word)
    else:
        _check_dictionary(key, value)


def empty_keys(config: ConfigDict) -> list[str]:
    """Returns the keys of `BY_WEIGHTS` whose values are empty or 0."""

    def value_of(key: str) -> Any:
        section, name = key.split(".")
        return config[section][name]

    return [key for key in BY_WEIGHTS if not value_of(key)]


@functools.cache
def default_values() -> dict[str, Any]:
    """Returns the default of each key; a duration or a dictionary is one value."""

    def values(section: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for name, default in section.items():
            if is_section(default):
                yield from values(default, f"{prefix}{name}.")
            else:
                yield prefix + name, default

    return dict(values(defaults.get_config(), ""))


def _check_numbers(key: str, value: Any, default: Any, allowed: Range) -> None:
    """Checks a number, or a tuple of numbers."""
    numbers = (value,)
    if isinstance(default, tuple):
        numbers = _entries(key, value)
        if allowed.length not in (None, len(numbers)):
            raise UserError(
                f"{key}={shown(value)} must have {allowed.length} entries, such as"
                f" {default}."
            )
        default = default[0]
    whole = isinstance(default, int)
    kind, types = ("whole number", int) if whole else ("number", int | float)
    most = allowed.most or (MOST_WHOLE if whole else MOST)
    for number in numbers:
        is_number = isinstance(number, types) and not isinstance(number, bool)
        if not is_number or number != number:  # NaN
            raise UserError(f"{key}={shown(number)} is not a {kind}.")
        if 0 < abs(number) < LEAST:
            raise UserError(
                f"{key}={number!r} is so small that devices take it for 0; it must be"
                f" at least {LEAST}, or 0 where that is allowed."
            )
        if allowed.below and NEAREST_TO_1 < number < 1:
            raise UserError(
                f"{key}={number!r} is so near to 1 that devices take it for 1; it can"
                f" be at most {NEAREST_TO_1}."
            )
        if not allowed.holds(number, most):
            is_known = allowed.high is not None or not number > most
            limits = str(allowed) if is_known else f"at most {most:,}"
            raise UserError(f"{key}={shown(number)} must be {limits}.")
    if allowed.ascending and list(numbers) != sorted(numbers):
        raise UserError(
            f"{key}={shown(value)} must be a smallest and a largest number."
        )


def _is_word(value: Any, *words: str) -> bool:
    # A comparison of an array is an array.
    return isinstance(value, str) and value in words


def _check_word(key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise UserError(f"{key}={shown(value)} is not a string.")


def _entries(key: str, value: Any) -> tuple:
    if not isinstance(value, tuple | list):
        raise UserError(f"{key}={shown(value)} is not a tuple.")
    return tuple(value)


def _check_dictionary(key: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{key}={shown(value)} is not a dictionary.")
    _check_plain(key, value)


def _check_plain(key: str, value: Any) -> None:
    """Checks that a value is one that checkpoints can record, in JSON."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            if not isinstance(name, str) or not name.isidentifier():
                raise UserError(
                    f"{key} has the key {shown(name)}, which is not a name."
                )
            _check_plain(f"{key}.{name}", entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            _check_plain(key, entry)
    elif isinstance(value, int | float) and not abs(value) <= MOST:
        raise UserError(f"{key}={shown(value)} is not a finite number.")
    elif not isinstance(value, str | int | float | None):
        raise UserError(
            f"{key}={shown(value)} is a {type(value).__name__}. Give a number, a"
            " string, a tuple or a dictionary."
        )
