"""Opens the data of a config: examples of the splits, and sizes of their images."""

import dataclasses
import functools
from collections.abc import Callable

from ml_collections import ConfigDict

from resnet_jax.config.durations import in_steps
from resnet_jax.config.sizes import eval_image_size
from resnet_jax.data.augment import Augment
from resnet_jax.data.cache import cached
from resnet_jax.data.derived_sources import check_same_classes, few_shot, with_classes
from resnet_jax.data.evalsets import EvaluationSet, open_set
from resnet_jax.data.loader import Examples, ResizeSchedule
from resnet_jax.data.source_protocol import NamedSource
from resnet_jax.data.sources import RecordedSplit, open_source
from resnet_jax.data.splits import SplitError
from resnet_jax.errors import UserError, check_known


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


def open_examples(
    config: ConfigDict,
    train: NamedSource | None = None,
    eval: NamedSource | None = None,
) -> tuple[Examples, Examples, dict[str, EvaluationSet]]:
    """Opens the training split, the eval split and the extra evaluation sets.

    Args:
      config: The run's config.
      train: The training split, in place of the config's, which is then not opened. An
        evaluation gives a `RecordedSplit`, of which it takes the classes.
      eval: The eval split, in place of the config's.

    Returns:
      The examples of the training split, augmented; those of the eval split; and the
      sets of `config.evaluate.sets` by name.

    Raises:
      UserError: A split cannot be opened, or the two have different classes.
    """
    data = config.data
    fake_shape = (data.image_size, data.image_size, data.channels)
    open_split = functools.partial(
        open_source, data_dir=data.data_dir, fake_shape=fake_shape
    )
    by_name = bool(data.eval_source) or train is not None
    train = train or _open(open_split, data, "source", "train_split")
    eval_source = "eval_source" if data.eval_source else "source"
    eval = eval or _open(open_split, data, eval_source, "eval_split")
    if by_name:
        eval = with_classes(eval, train.classes)
    else:
        check_same_classes(train, eval)
    if data.shots and not isinstance(train, RecordedSplit):
        train = few_shot(train, data.shots, config.seed)
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


def _open(
    open_split: Callable[[str, str], NamedSource],
    data: ConfigDict,
    source_key: str,
    split_key: str,
) -> NamedSource:
    """Opens a split; an error of the split begins with the keys that name it."""
    source, split = data[source_key], data[split_key]
    try:
        return open_split(source, split)
    except SplitError as error:
        raise UserError(
            f"data.{split_key}={split!r} of data.{source_key}={source!r}: {error}"
        ) from None


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
