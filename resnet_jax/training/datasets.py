"""Opens the data of a config: examples of the splits, and sizes of their images."""

import copy
import dataclasses
import logging

from ml_collections import ConfigDict

from resnet_jax.config.durations import in_steps
from resnet_jax.config.sizes import eval_image_size
from resnet_jax.data.augment import Augment
from resnet_jax.data.cache import cached
from resnet_jax.data.derived_sources import (
    balanced,
    check_same_classes,
    few_shot,
    hold_out,
    with_classes,
)
from resnet_jax.data.evalsets import EvaluationSet, open_set
from resnet_jax.data.loader import Examples, ResizeSchedule
from resnet_jax.data.source_protocol import NamedSource
from resnet_jax.data.sources import (
    GIVEN,
    RecordedSplit,
    Splits,
    open_source,
    splits_of,
)
from resnet_jax.data.splits import (
    ALL,
    EVAL_NAMES,
    HELD_OUT,
    SplitError,
    is_training,
    names_in,
)
from resnet_jax.errors import UserError, check_known

log = logging.getLogger(__name__)


def train_augment(config: ConfigDict) -> Augment:
    """Returns the augmentation of the training images."""
    data = config.data
    return Augment(
        size=data.image_size,
        crop=data.train_crop,
        scale=tuple(data.scale),
        ratio=tuple(data.ratio),
        pad=data.pad,
        pad_mode=data.pad_mode,
        short_side=tuple(data.short_side),
        crop_fraction=data.crop_fraction,
        interpolation=data.interpolation,
        flip=data.flip,
        decode=data.decode,
        policy=data.policy,
        color_jitter=tuple(data.color_jitter),
        lighting=data.lighting,
        erase=data.erase,
        erase_mode=data.erase_mode,
        erase_count=data.erase_count,
        colout=data.colout,
        mean=tuple(data.mean),
        std=tuple(data.std),
    )


def eval_augment(config: ConfigDict, crop_fraction: float) -> Augment:
    """Returns the preparation of the images that are evaluated.

    Args:
      config: The run's config.
      crop_fraction: The side of the central crop as a fraction of the shorter side.
    """
    data = config.data
    return Augment(
        size=eval_image_size(config),
        crop="five" if config.evaluate.views == "ten_crop" else "center",
        crop_fraction=crop_fraction,
        interpolation=data.interpolation,
    )


def resolve_splits(config: ConfigDict, reads_train: bool = True) -> ConfigDict:
    """Returns a config in which the splits have the names that the data give them.

    An empty `data.eval_split` becomes the usual name of an eval split that the data
    have, without those that are trained on. If there is none, it becomes `held_out`.
    The training split `train` becomes `training`, say, if only that is there.

    Args:
      config: The config, which is not changed. It is returned if nothing is resolved.
      reads_train: False if the training images need not exist.

    Raises:
      UserError: The data are not there, or no eval split can be chosen; the message
        says what to set.

    Examples:
      >>> from resnet_jax.config import load
      >>> config = load("configs/quickstart.py")
      >>> config.data.eval_split = ""
      >>> resolve_splits(config).data.eval_split
      'test'
    """
    data = config.data
    train_split, eval_split = data.train_split, data.eval_split
    other_source = data.eval_source
    # Images of another source are not held out of the training split.
    is_open = not eval_split or bool(other_source and eval_split == HELD_OUT)
    if data.source == GIVEN or not (
        is_open or (reads_train and train_split == "train")
    ):
        return config
    if not other_source or reads_train:
        splits = splits_of(data.source, train_split, data.data_dir)
        if splits and train_split == "train" and "train" not in splits.names:
            train_split = next(filter(is_training, splits.names), train_split)
    if is_open:
        if other_source:
            splits = splits_of(other_source, data_dir=data.data_dir)
        eval_split = _eval_split(config, splits, train_split)
    if (train_split, eval_split) == (data.train_split, data.eval_split):
        return config
    config = copy.deepcopy(config)
    config.data.train_split, config.data.eval_split = train_split, eval_split
    return config


def _eval_split(config: ConfigDict, splits: Splits | None, train_split: str) -> str:
    """Returns the split of a config's eval source to evaluate on."""
    data = config.data
    key = "eval_source" if data.eval_source else "source"
    source = data[key]
    if splits is None:
        raise UserError(
            f"data.eval_split is empty, and data.{key}={source!r} does not say which of"
            " its splits is to evaluate on; give --config.data.eval_split=SPLIT or"
            " --config.data.eval_source=SOURCE."
        )
    trained = set() if data.eval_source else names_in(train_split)
    if ALL in trained:
        trained = set(splits.names)
    by_name = {name.casefold(): name for name in splits.names if name not in trained}
    for name in EVAL_NAMES:
        if by_name.get(name) in splits.evaluated:
            return by_name[name]
        if name in by_name:
            log.warning(
                "The split %s of %s is not evaluated, since it has no class folders of"
                " the training split.",
                *(by_name[name], source),
            )
    if not data.eval_source:
        return HELD_OUT
    if len(splits.names) == 1:
        return splits.names[0]
    raise UserError(
        f"data.eval_split is empty, and data.eval_source={source!r} has no split with a"
        f" usual name ({', '.join(EVAL_NAMES)}); give --config.data.eval_split, one of"
        f" {', '.join(splits.names)}."
    )


def open_splits(
    config: ConfigDict,
    train: NamedSource | None = None,
    eval: NamedSource | None = None,
) -> tuple[NamedSource, NamedSource]:
    """Opens the training split and the eval split.

    Args:
      config: The run's config, whose splits are resolved (`resolve_splits`).
      train: The training split, in place of the config's, which is then not opened. An
        evaluation gives a `RecordedSplit`, of which it takes the classes.
      eval: The eval split, in place of the config's.

    Returns:
      The images to train on, without those that are held out, and the images to
      evaluate on. Their classes have the same numbers.

    Raises:
      UserError: A split cannot be opened, or the two have different classes.
    """
    data = config.data
    by_name = bool(data.eval_source) or train is not None
    if eval is None and _holds_out(config):
        kept, eval = hold_out(
            _open(config, "source", "train_split"), data.eval_fraction, config.seed
        )
        train = train or kept
    train = train or _open(config, "source", "train_split")
    eval_source = "eval_source" if data.eval_source else "source"
    eval = eval or _open(config, eval_source, "eval_split")
    if by_name:
        eval = with_classes(eval, train.classes)
    else:
        check_same_classes(train, eval)
    return _chosen(train, config), eval


def open_train_split(config: ConfigDict) -> NamedSource:
    """Opens the images that a run trains on; the eval split need not exist.

    Args:
      config: The run's config.

    Raises:
      UserError: The split cannot be opened.
    """
    config = resolve_splits(config)
    train = _open(config, "source", "train_split")
    if _holds_out(config):
        train, _ = hold_out(train, config.data.eval_fraction, config.seed)
    return _chosen(train, config)


def _holds_out(config: ConfigDict) -> bool:
    """Tells whether the images to evaluate on are a part of the training split."""
    data = config.data
    if data.eval_split != HELD_OUT or data.source == GIVEN:
        return False
    splits = splits_of(data.source, data.train_split, data.data_dir)
    # A folder may have any name.
    return splits is None or HELD_OUT not in splits.names


def _chosen(train: NamedSource, config: ConfigDict) -> NamedSource:
    """Returns the images of a training split that `data.shots` and `balance` choose."""
    if isinstance(train, RecordedSplit):
        return train
    if config.data.shots:
        train = few_shot(train, config.data.shots, config.seed)
    return balanced(train) if config.data.balance else train


def open_examples(
    config: ConfigDict,
    train: NamedSource | None = None,
    eval: NamedSource | None = None,
) -> tuple[Examples, Examples, dict[str, EvaluationSet]]:
    """Opens the training split, the eval split and the extra evaluation sets.

    Args:
      config: The run's config, whose splits are resolved (`resolve_splits`).
      train: The training split, in place of the config's; see `open_splits`.
      eval: The eval split, in place of the config's.

    Returns:
      The examples of the training split, augmented; those of the eval split; and the
      sets of `config.evaluate.sets` by name.

    Raises:
      UserError: A split cannot be opened, or the two have different classes.
    """
    data = config.data
    train, eval = open_splits(config, train, eval)
    eval = cached(eval, data.channels, data.cache, data.max_pixels)
    skip_bad = data.on_bad_image == "skip"

    def eval_examples(source: NamedSource, cropped: bool, most_labels: int) -> Examples:
        crop_fraction = 1.0 if cropped else data.crop_fraction
        return Examples(
            source=source,
            augment=eval_augment(config, crop_fraction),
            channels=data.channels,
            skip_bad=skip_bad,
            label_shape=(most_labels,) if most_labels else (),
            max_pixels=data.max_pixels,
        )

    return (
        Examples(
            source=train,
            augment=train_augment(config),
            channels=data.channels,
            skip_bad=skip_bad,
            repeats=data.repeats,
            max_pixels=data.max_pixels,
        ),
        eval_examples(eval, cropped=False, most_labels=0),
        {
            name: open_set(
                name, train.classes, data_dir=data.data_dir, make_examples=eval_examples
            )
            for name in config.evaluate.sets
        },
    )


def _open(config: ConfigDict, source_key: str, split_key: str) -> NamedSource:
    """Opens a split; an error of the split begins with the keys that name it."""
    data = config.data
    source, split = data[source_key], data[split_key]
    fake_shape = (data.image_size, data.image_size, data.channels)
    try:
        return open_source(source, split, data_dir=data.data_dir, fake_shape=fake_shape)
    except SplitError as error:
        way_out = ""
        if split_key == "eval_split" and not data.eval_source:
            way_out = _way_out(config)
        raise UserError(
            f"data.{split_key}={split!r} of data.{source_key}={source!r}: {error}"
            f"{way_out}"
        ) from None


def _way_out(config: ConfigDict) -> str:
    """Returns how to evaluate if the training split is the only one; '' otherwise."""
    splits = splits_of(
        config.data.source, config.data.train_split, config.data.data_dir
    )
    if splits is None or len(splits.names) > 1:
        return ""
    return (
        " To hold images out of it for evaluation, give --config.data.eval_split= (that"
        " is, nothing)."
    )


def make_resize(
    config: ConfigDict, train_size: int, total_steps: int
) -> ResizeSchedule | None:
    """Returns the schedule of `data.resize_schedule`, or None if that is empty.

    Args:
      config: The run's config.
      train_size: The number of training images.
      total_steps: The length of the run in steps.

    Raises:
      UserError: The schedule lacks a key or contradicts itself or the run.
    """
    schedule, name = config.data.resize_schedule, "data.resize_schedule"
    if not schedule:
        return None
    known = ("first", "last", "start", "end", "multiple")
    for key in schedule:
        check_known(f"{name}.{key}", key, known)
    for key in known[:-1]:
        if key not in schedule:
            raise UserError(f"{name} must have {', '.join(known[:-1])}, but no {key}.")
    if schedule.last != config.data.image_size:
        raise UserError(
            f"{name}.last={schedule.last} must be"
            f" data.image_size={config.data.image_size}, the size at the end."
        )
    first, multiple = schedule.first, schedule.get("multiple", 1)
    start, end = (
        in_steps(
            schedule[key], config.batch_size, train_size, f"{name}.{key}", total_steps
        )
        for key in ("start", "end")
    )
    if not start < end:
        raise UserError(
            f"{name}.end={dict(schedule.end)} must be after its start,"
            f" {dict(schedule.start)}."
        )
    if end > total_steps:
        raise UserError(
            f"{name}.end={dict(schedule.end)} is step {round(end):,}, but the run"
            f" (config.total) has only {total_steps:,}; lengthen the run, or start one"
            " whose images grow earlier."
        )
    # Raises UserError for a crop that cannot be of the first size.
    dataclasses.replace(train_augment(config), size=first)
    return ResizeSchedule(
        first=first, last=schedule.last, start=start, end=end, multiple=multiple
    )
