"""Evaluates exactly: every image once, on any number of devices."""

import contextlib
import dataclasses
import json
import logging
import pathlib
import re
import shlex
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_jax.config import override
from resnet_jax.config.saved import as_json, differences, from_saved
from resnet_jax.config.variants import for_evaluation
from resnet_jax.console import output
from resnet_jax.data.evalsets import summarize
from resnet_jax.data.loader import Examples, bad_indices
from resnet_jax.data.source_protocol import NamedSource
from resnet_jax.data.sources import RecordedSplit
from resnet_jax.data.splits import HELD_OUT
from resnet_jax.errors import UserError
from resnet_jax.parallel import sharding
from resnet_jax.persistence import metric_writers, storage
from resnet_jax.persistence.checkpoints import open_checkpoints
from resnet_jax.persistence.preemption import Preemption
from resnet_jax.persistence.storage import Path
from resnet_jax.reports import classification
from resnet_jax.reports.predictions import PredictionTable
from resnet_jax.reports.samples import SamplePredictions
from resnet_jax.training.completion import as_completed
from resnet_jax.training.experiment import Experiment, set_up
from resnet_jax.training.programs import compile_eval_steps, state_like
from resnet_jax.training.resume import data_changes, describe_data, spec_change
from resnet_jax.training.step import TrainState
from resnet_jax.weights.card import most_probable

log = logging.getLogger(__name__)

# The number of the most probable classes in a table of predictions.
TOP = 5

# Keys that decide which arrays a network has begin with these.
NETWORK = ("model.name", "model.overrides", "model.scan_blocks")


def names_of_classes(known: Sequence[str], number: int) -> list[str]:
    """Returns a name for each class of a network, of which some may be unknown."""
    return [*known, *(f"class {i}" for i in range(len(known), number))]


class Outcomes:
    """The label and the prediction of each image of an evaluation, in their order.

    Args:
      source: The images.
      classes: The names of the classes that the network tells apart.
      table: The table to which the predictions are written; None for no table.
    """

    def __init__(
        self,
        source: NamedSource,
        classes: Sequence[str],
        table: PredictionTable | None = None,
    ):
        self._source = source
        self._classes = classes
        self._table = table
        self._rows = 0
        self._labels: list[np.ndarray] = []
        self._predicted: list[np.ndarray] = []

    def add(self, batch: Mapping[str, np.ndarray]) -> None:
        """Takes the outcomes of the next batch.

        Args:
          batch: `logits`, `label` and `mask` of all rows; see `step.make_eval_step`.
        """
        places = np.flatnonzero(batch["mask"])
        logits, labels = batch["logits"][places], batch["label"][places]
        # The metrics count an image whose logits are not all numbers as wrong.
        known = ~np.isnan(logits).any(axis=-1)
        self._labels.append(labels)
        self._predicted.append(np.where(known, logits.argmax(axis=-1), -1))
        if self._table:
            for place, row, label in zip(places.tolist(), logits, labels, strict=True):
                numbers = [
                    number for number in label.reshape(-1).tolist() if number >= 0
                ]
                names = "|".join(self._classes[number] for number in numbers)
                path = self._source.name(self._rows + place)
                top = most_probable(row, self._table.k, self._classes.__getitem__)
                self._table.add(path, names, top, row)
        self._rows += len(batch["mask"])

    def figures(self) -> dict:
        """Returns the figures of the classes; see `classification.figures`.

        They are empty for images that have several labels or none.
        """
        labels = np.concatenate(self._labels)
        if labels.ndim > 1:
            return {}
        predicted = np.concatenate(self._predicted)
        return classification.figures(labels, predicted, self._classes)


@dataclasses.dataclass
class Evaluation:
    """The result of one pass over a split.

    Attributes:
      top1: The fraction of the images whose class was predicted first.
      top5: The fraction of the images whose class was among the first five.
      loss: The mean cross entropy in nats, without label smoothing.
      n_seen: The number of images that were evaluated.
      bad_images: The indices of the images that could not be decoded.
    """

    top1: float
    top5: float
    loss: float
    n_seen: int
    bad_images: list[int]

    def with_classes(self, outcomes: Outcomes) -> dict:
        """Returns the figures with those of the classes and an interval of top-1.

        Args:
          outcomes: The outcome of every image of the pass.
        """
        correct = round(self.top1 * self.n_seen)
        interval = classification.interval(correct, self.n_seen)
        return self.scalars() | {"top1_interval": interval} | outcomes.figures()

    def scalars(self) -> dict:
        """Returns the figures that are logged."""
        return {key: getattr(self, key) for key in ("top1", "top5", "loss", "n_seen")}


def evaluate(
    experiment: Experiment,
    examples: Examples,
    eval_steps: Mapping[tuple[int, ...], Callable],
    state: TrainState,
    *,
    after_batch: Callable[[], None],
    samples: SamplePredictions | None = None,
    outcomes: Outcomes | None = None,
    labels: Collection[int] | None = None,
) -> Evaluation:
    """Evaluates a state on some examples, each of which counts exactly once.

    Args:
      experiment: The experiment.
      examples: The examples of the eval split or of an extra evaluation set.
      eval_steps: The result of `programs.compile_eval_steps`.
      state: The state. Its EMA is evaluated if it has one.
      after_batch: A function that is called after each batch. It may raise to stop.
      samples: Collects some of this process's images with their predictions.
      outcomes: Collects the outcome of every image, if `eval_steps` return logits.
      labels: The classes that can be predicted; by default all.

    Returns:
      The metrics over all images that could be decoded.

    Raises:
      UserError: An image was not seen exactly once, or there is none to evaluate.
    """
    eval_step = eval_steps[examples.label_shape]
    variables = state.evaluated()
    num_classes = experiment.model.spec.num_classes
    allowed = np.isin(
        np.arange(num_classes), list(range(num_classes) if labels is None else labels)
    )
    allowed = jax.device_put(allowed, sharding.replicated(experiment.mesh))
    size = len(examples.source)
    totals = {"top1": 0, "top5": 0, "loss": 0.0, "n": 0, "unlabelled": 0}
    indices: list[int] = []
    bad: set[int] = set()

    def take(batch: dict, sums: dict, predictions: dict) -> None:
        for key, value in jax.device_get(sums).items():
            totals[key] += value.item()
        indices.extend(batch["index"][batch["mask"]])
        bad.update(bad_indices(batch))
        if samples:
            local = {key: sharding.local_values(x) for key, x in predictions.items()}
            samples.add(batch, local)
        if outcomes:
            outcomes.add(jax.device_get(predictions))
        after_batch()

    with experiment.eval_batches(examples) as batches:
        # The devices work on one batch while the next one is fetched.
        running = None
        for batch in batches:
            outputs = eval_step(variables, experiment.eval_to_devices(batch), allowed)
            if running:
                take(*running)
            running = (batch, *outputs)
        if running:
            take(*running)

    labelled, unlabelled = int(totals["n"]), int(totals["unlabelled"])
    bad_images = sorted(sharding.union(bad))
    decoded = labelled + unlabelled
    if decoded + len(bad_images) != size or len(set(indices)) != len(indices):
        raise UserError(
            f"The evaluation saw {decoded} images ({len(set(indices))} different ones"
            f" in this process) and could not decode {len(bad_images)}, but the split"
            f" has {size}; its result would be wrong."
        )
    if not labelled:
        why = ""
        if bad_images:
            why = (
                f", as {len(bad_images):,} cannot be decoded; without"
                " on_bad_image=skip, the first one is named with the reason"
            )
        raise UserError(f"{examples.source.title} holds no image to evaluate{why}.")
    return Evaluation(
        top1=totals["top1"] / labelled,
        top5=totals["top5"] / labelled,
        loss=totals["loss"] / labelled,
        n_seen=labelled,
        bad_images=bad_images,
    )


def evaluate_sets(
    experiment: Experiment,
    eval_steps: Mapping[tuple[int, ...], Callable],
    state: TrainState,
    *,
    after_batch: Callable[[], None],
) -> dict[str, dict]:
    """Evaluates a state on all sets of `config.evaluate.sets`.

    Args:
      experiment: The experiment.
      eval_steps: The result of `programs.compile_eval_steps`.
      state: The state. Its EMA is evaluated if it has one.
      after_batch: A function that is called after each batch. It may raise to stop.

    Returns:
      The result of `evalsets.summarize` for each set, by its name.

    Raises:
      UserError: An image was not seen exactly once, or a set has none to evaluate.
    """
    results = {}
    for name, evaluation_set in experiment.sets.items():
        parts = {}
        for part, examples in evaluation_set.parts.items():
            result = evaluate(
                experiment,
                examples,
                eval_steps,
                state,
                after_batch=after_batch,
                labels=evaluation_set.labels,
            )
            parts[part] = result.scalars() | {"bad_images": len(result.bad_images)}
        results[name] = summarize(evaluation_set, parts)
    return results


def evaluate_workdir(
    workdir: Path,
    checkpoint: str = "best",
    overrides: Sequence[str] = (),
    command: str = "",
    *,
    named_config: ConfigDict | None = None,
    **timeouts: float,
) -> dict:
    """Evaluates a checkpoint of a workdir, and writes `eval_SPLIT.json` there.

    The config and the classes are those that the checkpoint recorded. The training
    images need not exist any more.

    Args:
      workdir: The run's directory.
      checkpoint: The checkpoint that is evaluated: `best` or `last`.
      overrides: Settings in place of the run's own, as `--config.KEY=VALUE` each; the
        result names those that differ.
      command: The command that repeats the evaluation, for the result.
      named_config: A config that the user named. It is not used; a warning lists the
        keys in which it differs from the run's own.
      timeouts: The seconds `grace` and `stall_timeout` of `Preemption`.

    Returns:
      The content of `eval_SPLIT.json`.

    Raises:
      UserError: There is no such checkpoint, or the overrides or the named config ask
        for other classes or another network, or other images are held out.
      PreemptedError: A signal asked the evaluation to stop.
    """
    with (
        Preemption(workdir, **timeouts) as preemption,
        open_checkpoints(workdir) as saved,
    ):
        # The arrays are read at once, since the run may replace the checkpoint.
        record, variables = saved.load(checkpoint)
        step = record["progress"]["step"]
        config = from_saved(record["config"])
        override(config, list(overrides))
        changed = differences(record["config"], config)
        _check_network(record["config"], config, workdir)
        _warn_of_named_config(config, named_config, workdir)
        experiment = _set_up_as_trained(config, record, workdir)
        changes = _changes_of_split(experiment, record, changed)
        if changes and experiment.config.data.eval_split == HELD_OUT:
            source = shlex.quote(f"--config.data.source=csv:{workdir / 'split.csv'}")
            raise UserError(
                f"The images that are held out of {config.data.source} are not those of"
                " the run, since files, the seed or data.eval_fraction have changed."
                f" Some may have been trained on. Add {source}"
                " --config.data.eval_split=val to evaluate those of the run."
            )
        changed += changes
        like = state_like(experiment)
        names = ("ema",) if like.ema else ("params", "batch_stats")
        placed = sharding.place(
            {name: variables[name] for name in names},
            {name: getattr(like, name) for name in names},
        )
        state = TrainState(
            step=step,
            params=placed.get("params"),
            batch_stats=placed.get("batch_stats"),
            opt_state=None,
            ema=placed.get("ema"),
        )
        is_lead = jax.process_index() == 0
        say = output.say if is_lead else lambda text: None
        split = experiment.eval.source
        class_names = names_of_classes(
            experiment.classes, experiment.model.spec.num_classes
        )
        say(f"evaluating the checkpoint of step {step} on {split.title}")
        for line in changed:
            say(f"different from training: {line}")
        preemption.check()
        eval_steps = compile_eval_steps(experiment, returns_logits=True)
        preemption.check()
        check = preemption.check
        stack = contextlib.ExitStack()
        with tempfile.TemporaryDirectory() as folder, stack:
            table = pathlib.Path(folder) / "predictions.csv"
            outcomes = Outcomes(
                split,
                class_names,
                stack.enter_context(PredictionTable(table, TOP)) if is_lead else None,
            )
            result = evaluate(
                experiment,
                experiment.eval,
                eval_steps,
                state,
                after_batch=check,
                outcomes=outcomes,
            )
            stack.close()
            predictions = table.read_bytes() if is_lead else b""
        sets = evaluate_sets(experiment, eval_steps, state, after_batch=check)
    content = {
        **result.with_classes(outcomes),
        "step": step,
        "checkpoint": checkpoint,
        "split": split.title,
        "changed": changed,
        "bad_images": [split.name(i) for i in result.bad_images],
        "sets": sets,
        "command": command,
    }
    if is_lead:
        eval_split = experiment.config.data.eval_split
        name = re.sub(r"[^\w]+", "_", eval_split).strip("_")
        for path, product in (
            (workdir / f"eval_{name}.json", content),
            (workdir / f"eval_{name}.csv", predictions),
        ):
            with output.dispensable(str(path)):
                storage.write_by_product(path, product)
        for name, values in sets.items():
            say(f"{name}: {metric_writers.describe(values)}")
    return content


def _check_network(old: Mapping, config: ConfigDict, workdir: Path) -> None:
    """Raises UserError if overrides ask for other arrays than a run has."""
    changes = [x for x in differences(old, config) if x.startswith(NETWORK)]
    if config.ema_decay and not old.get("ema_decay"):
        changes.append("ema_decay: the run has no EMA")
    if changes:
        raise UserError(
            f"{workdir} holds another network ({'; '.join(changes)}). Leave that"
            " override out."
        )


def _warn_of_named_config(
    config: ConfigDict, named_config: ConfigDict | None, workdir: Path
) -> None:
    """Warns of differences between a config that the user named and the used one.

    Values that the named config leaves empty are no differences. Raises UserError if it
    is of another network.
    """
    if not named_config:
        return
    changes = differences(
        json.loads(as_json(config)), as_completed(named_config, config)
    )
    if not changes:
        return
    if network_changes := [line for line in changes if line.startswith(NETWORK)]:
        raise UserError(
            f"{workdir} holds another network than --config"
            f" ({'; '.join(network_changes)}). Leave --config out: the run's own is"
            " used."
        )
    log.warning(
        "--config differs from the run's own config (%s%s), which is used. Write"
        " --config.KEY=VALUE for each key that should differ.",
        *("; ".join(changes[:3]), " ..." if len(changes) > 3 else ""),
    )


def _set_up_as_trained(
    config: ConfigDict, record: Mapping, workdir: Path
) -> Experiment:
    """Returns an experiment that evaluates the network of a checkpoint's record."""
    data = record.get("data")
    train = None
    if data:
        size = data["train"]["images"]
        train = RecordedSplit(tuple(data["classes"]), size, config.data.source)
    mesh = sharding.make_mesh()
    experiment = set_up(for_evaluation(config, mesh.size), mesh, train)
    if change := spec_change(record["spec"], experiment.model.spec):
        raise UserError(
            f"{workdir} holds another network ({change}). Evaluate it with the classes"
            " and the channels that it was trained for."
        )
    return experiment


def _changes_of_split(
    experiment: Experiment, record: Mapping, changed: Sequence[str]
) -> list[str]:
    """Returns how the images of the eval split differ from those that were recorded.

    Nothing is returned where `changed`, the differences of the configs, names another
    split.
    """
    keys = "data.source", "data.eval_source", "data.eval_split", "data.data_dir"
    if "data" not in record:
        log.warning(
            "This run was started by a version that did not record the class names and"
            " the images, so whether they are the same now cannot be compared."
        )
        return []
    if any(line.startswith(keys) for line in changed):
        return []
    data = describe_data(experiment.train.source, experiment.eval.source)
    return data_changes(record["data"], data, ["eval"])
