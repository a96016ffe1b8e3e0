"""Evaluates weights of any origin on any images, without a run."""

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from resnet_jax.config import defaults, values
from resnet_jax.config.variants import for_evaluation
from resnet_jax.data.derived_sources import with_classes
from resnet_jax.data.evalsets import SETS, summarize
from resnet_jax.data.source_protocol import NamedSource
from resnet_jax.data.sources import RecordedSplit, open_source, split_of, splits_of
from resnet_jax.data.splits import EVAL_NAMES, is_training
from resnet_jax.errors import UserError
from resnet_jax.parallel import sharding
from resnet_jax.persistence import storage
from resnet_jax.reports.predictions import PredictionTable
from resnet_jax.training.evaluation import Outcomes, evaluate, names_of_classes
from resnet_jax.training.experiment import Experiment, set_up
from resnet_jax.training.programs import compile_eval_steps, state_like
from resnet_jax.training.step import TrainState
from resnet_jax.weights import native
from resnet_jax.weights.adapt import as_rgb
from resnet_jax.weights.card import Card
from resnet_jax.weights.load import read

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
    """The images on which weights are evaluated.

    Attributes:
      source: The source, as in `data.source`, or the name of an evaluation set.
      split: The split of the source; empty for an evaluation set.
      data_dir: The directory of the data sets of tfds; empty for its default.
    """

    source: str
    split: str
    data_dir: str = ""

    @property
    def is_set(self) -> bool:
        """Tells whether the images are an evaluation set of `evalsets.SETS`."""
        return is_set(self.source)

    def open(self) -> NamedSource:
        """Opens the split of a source.

        Raises:
          UserError: It cannot be opened.
        """
        return open_source(self.source, self.split, data_dir=self.data_dir)


def is_set(source: str) -> bool:
    """Tells whether a text is the name of an evaluation set."""
    return source.partition("/")[0] in SETS


def find_data(text: str, split: str | None = None, data_dir: str = "") -> Data:
    """Returns the images that a text names.

    Args:
      text: A source, `SOURCE@SPLIT`, or the name of an evaluation set.
      split: The split. None takes the one of the text, or the usual name of an eval
        split that the source has, or its only split.
      data_dir: The directory of the data sets of tfds; empty for its default.

    Raises:
      UserError: The source is unknown, or which split is meant is not clear.
    """
    source, named = split_of(text)
    split = split or named
    if is_set(source):
        if split:
            raise UserError(
                f"The split {split} has no effect on the evaluation set {source}; leave"
                " it out."
            )
        return Data(source, "", data_dir)
    if split:
        return Data(source, split, data_dir)
    splits = splits_of(source, data_dir=data_dir)
    if splits is None:
        raise UserError(
            f"{source} does not say which of its splits is to evaluate on; give"
            " --split=SPLIT."
        )
    by_name = {name.casefold(): name for name in splits.evaluated}
    usual = [by_name[name] for name in EVAL_NAMES if name in by_name]
    if not usual and len(splits.names) > 1:
        raise UserError(
            f"{source} has no split with a usual name ({', '.join(EVAL_NAMES)}); give"
            f" --split, one of {', '.join(splits.names)}."
        )
    return Data(source, [*usual, *splits.names][0], data_dir)


def evaluate_weights(
    weights: str,
    data: Data,
    *,
    model: str | None = None,
    settings: Mapping[str, Any] | None = None,
    table: PredictionTable | None = None,
) -> dict:
    """Evaluates weights on images, each of which counts exactly once.

    Args:
      weights: A file, a weights directory, a workdir or `timm:NAME.TAG`.
      data: The images.
      model: The network's name in the zoo, for a file that does not say it.
      settings: Values of keys of a config, such as `evaluate.views`, in place of those
        of the weights' card.
      table: The table to which the predictions are written; None for no table.

    Returns:
      The figures of `Evaluation.with_classes`, without `top5` for at most five classes;
      what was evaluated (`weights`, `network`, `image_size`, `split`, `classes`); and
      the names of `bad_images`.

    Raises:
      UserError: The weights or the images cannot be read, or they do not fit each
        other.
    """
    card, variables = as_rgb(*read(weights, model=model))
    if not card.spec["num_classes"]:
        raise UserError(
            f"{weights} has no head, so it predicts no classes; name weights with one."
        )
    _warn_of_trained_images(weights, data)
    experiment = _experiment(weights, card, data, settings or {})
    classes = names_of_classes(experiment.classes, card.spec["num_classes"])
    state = _state(experiment, variables)
    eval_steps = compile_eval_steps(experiment, returns_logits=True)
    content = {
        "weights": weights,
        "network": card.network,
        "image_size": experiment.eval.augment.size,
        "split": experiment.eval.source.title,
    }
    run = functools.partial(
        evaluate,
        experiment,
        eval_steps=eval_steps,
        state=state,
        after_batch=lambda: None,
    )
    if not data.is_set:
        examples = experiment.eval
        outcomes = Outcomes(examples.source, classes, table)
        result = run(examples, outcomes=outcomes)
        content |= result.with_classes(outcomes)
        bad_images = [examples.source.name(i) for i in result.bad_images]
    else:
        ((name, evaluation_set),) = experiment.sets.items()
        parts, bad_images = {}, []
        for part, examples in evaluation_set.parts.items():
            outcomes = Outcomes(examples.source, classes, table)
            result = run(examples, outcomes=outcomes, labels=evaluation_set.labels)
            parts[part] = result.with_classes(outcomes) | {
                "bad_images": len(result.bad_images)
            }
            bad_images += [examples.source.name(i) for i in result.bad_images]
        content["split"] = name
        # Figures of classes are means over images, which corruptions repeat.
        several = len(parts) > 1
        content |= summarize(evaluation_set, parts) if several else parts.popitem()[1]
    if len(classes) <= 5:
        del content["top5"]
    return {**content, "classes": classes, "bad_images": bad_images}


def _experiment(
    weights: str, card: Card, data: Data, settings: Mapping[str, Any]
) -> Experiment:
    """Returns an experiment that evaluates the network of a card for RGB images."""
    config = defaults.get_config()
    with config.ignore_type():
        config.model.name = card.network
        config.model.overrides = ConfigDict(
            card.overrides() | {"num_classes": card.spec["num_classes"]}
        )
        for key in ("image_size", "mean", "std", "interpolation", "crop_fraction"):
            config.data[key] = getattr(card, key)
        config.data.channels = card.spec["in_channels"]
        config.data.data_dir = data.data_dir
        # All images are evaluated once, so none is worth keeping.
        config.data.cache = "none"
        config.batch_size = 64
        if data.is_set:
            config.evaluate.sets = (data.source,)
        for key, value in settings.items():
            values.check_value(key, value)
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
    mesh = sharding.make_mesh()
    train, split = _splits(weights, card, data)
    return set_up(for_evaluation(config, mesh.size), mesh, train, split)


def _splits(weights: str, card: Card, data: Data) -> tuple[RecordedSplit, NamedSource]:
    """Returns the classes of the network, as a split, and the images to evaluate."""
    number, known = card.spec["num_classes"], card.classes
    source = None if data.is_set else data.open()
    if not known and source:
        if len(source.classes) != number:
            raise UserError(
                f"{weights} has {number:,} classes without names, and {source.title}"
                f" has {len(source.classes):,}; evaluate it on images of the"
                f" {number:,} classes that it was trained for."
            )
        log.warning(
            "%s does not name its classes, so they are taken to be those of %s, in the"
            " same order.",
            *(weights, source.title),
        )
        known = source.classes
    recorded = RecordedSplit(tuple(names_of_classes(known, number)), 1, weights)
    # An evaluation set is opened with the experiment.
    return recorded, with_classes(source, recorded.classes) if source else recorded


def _state(experiment: Experiment, variables: dict) -> TrainState:
    """Returns a state that holds variables alone, on the devices."""
    like = state_like(experiment)
    placed = sharding.place(
        variables, {name: getattr(like, name) for name in variables}
    )
    return TrainState(
        step=0,
        params=placed["params"],
        batch_stats=placed.get("batch_stats", {}),
        opt_state=None,
        ema=None,
    )


def _warn_of_trained_images(weights: str, data: Data) -> None:
    """Warns if the weights are those of a run that trained on the images."""
    workdir = storage.path_of(weights)
    if data.is_set or not is_training(data.split) or not native.is_workdir(workdir):
        return
    try:
        trained = storage.read_object(workdir / "config.json")["data"]["source"]
    except (FileNotFoundError, KeyError, UserError):
        return
    if _absolute(trained) == _absolute(data.source):
        log.warning(
            "The split %s of %s includes images that %s was trained on, so these"
            " figures are better than those of new images. If the run held images out,"
            " csv:%s has them.",
            *(data.split, data.source, weights, workdir / "split.csv"),
        )


def _absolute(source: str) -> str:
    kind, colon, path = source.partition(":")
    return f"{kind}:{os.path.abspath(path)}" if colon and "://" not in path else source
