"""Exact evaluation: every image once."""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_jax.config import override
from resnet_jax.config.saved import as_json, differences, from_saved
from resnet_jax.config.variants import for_evaluation
from resnet_jax.console import output
from resnet_jax.data.evalsets import summarize
from resnet_jax.data.loader import bad_indices
from resnet_jax.data.sources import RecordedSplit
from resnet_jax.errors import UserError
from resnet_jax.parallel import sharding
from resnet_jax.persistence import metric_writers, storage
from resnet_jax.persistence.checkpoints import explaining_damage, open_checkpoints
from resnet_jax.persistence.preemption import Preemption
from resnet_jax.persistence.storage import Path
from resnet_jax.reports.samples import SamplePredictions
from resnet_jax.training.experiment import Setup, set_up
from resnet_jax.training.resume import data_changes, describe_data, spec_change
from resnet_jax.training.step import TrainState

log = logging.getLogger(__name__)

# Beginnings of the keys that say which arrays a network has.
NETWORK = ("model.name", "model.overrides", "model.scan_blocks")


@dataclasses.dataclass
class Evaluation:
    """The result of one pass over a split.

    Attributes:
      top1, top5: fraction of the images whose class was first, among the first five.
      loss: mean cross entropy in nats, without label smoothing.
      n_seen: images that were evaluated.
      bad_images: indices of the images that could not be decoded.
    """

    top1: float
    top5: float
    loss: float
    n_seen: int
    bad_images: list[int]

    def scalars(self) -> dict:
        """The figures that are logged."""
        return {key: getattr(self, key) for key in ("top1", "top5", "loss", "n_seen")}


def evaluate(
    setup: Setup,
    eval_step: Callable,
    state: TrainState,
    *,
    after_batch: Callable[[], None],
    samples: SamplePredictions | None = None,
    labels: Collection[int] | None = None,
) -> Evaluation:
    """Evaluates a state on the test split; sums are divided at the very end.

    Args:
      setup: of the run.
      eval_step: of `Setup.compile_eval_step`.
      state: whose averaged parameters are taken, if it has any.
      after_batch: called after each batch; may raise to stop.
      samples: takes some of this process's images.
      labels: the classes that can be predicted; None: all.

    Raises:
      UserError: not every image was seen exactly once.
    """
    variables = state.evaluated()
    num_classes = setup.model.spec.num_classes
    allowed = np.isin(
        np.arange(num_classes), list(range(num_classes) if labels is None else labels)
    )
    allowed = jax.device_put(allowed, sharding.replicated(setup.mesh))
    size = len(setup.test.source)
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
        after_batch()

    with setup.eval_batches() as batches:
        # The devices work on one batch while the next one is fetched.
        working = None
        for batch in batches:
            outputs = eval_step(variables, setup.eval_to_devices(batch), allowed)
            if working:
                take(*working)
            working = (batch, *outputs)
        if working:
            take(*working)

    seen, unlabelled = totals["n"], totals["unlabelled"]
    bad_images = sorted(sharding.union(bad))
    met = seen + unlabelled
    if met + len(bad_images) != size or len(set(indices)) != len(indices):
        raise UserError(
            f"The evaluation saw {met} images ({len(set(indices))} different ones in"
            f" this process) and could not decode {len(bad_images)}, but the split has"
            f" {size}; its result would be wrong."
        )
    if not seen:
        raise UserError(f"{setup.test.source.where} holds no image to evaluate.")
    return Evaluation(
        top1=totals["top1"] / seen,
        top5=totals["top5"] / seen,
        loss=totals["loss"] / seen,
        n_seen=seen,
        bad_images=bad_images,
    )


def evaluate_sets(
    setup: Setup,
    eval_steps: Mapping[tuple, Callable],
    state: TrainState,
    *,
    after_batch: Callable[[], None],
) -> dict[str, dict]:
    """Evaluates a state on all sets of `config.evaluate.sets`; returns their results.

    Arguments as in `evaluate`, which says what is raised; `eval_steps` are those of
    `Setup.compile_eval_steps`.
    """
    results = {}
    for name, opened in setup.sets.items():
        of_parts = {}
        for config, examples in opened.parts.items():
            result = evaluate(
                setup.on(examples),
                eval_steps[examples.label_shape],
                state,
                after_batch=after_batch,
                labels=opened.labels,
            )
            of_parts[config] = result.scalars()
            of_parts[config]["bad_images"] = len(result.bad_images)
        results[name] = summarize(opened, of_parts)
    return results


def evaluate_workdir(
    workdir: Path,
    which: str = "best",
    overrides: Sequence[str] = (),
    command: str = "",
    *,
    given: ConfigDict | None = None,
    **limits: float,
) -> dict:
    """Evaluates a checkpoint of a workdir; writes `eval_SPLIT.json` there.

    The config is the run's own, as the checkpoint recorded it, and so are the classes:
    the training images need not be there.

    Args:
      workdir: The run's directory.
      which: The checkpoint: `best` or `last`.
      overrides: What to evaluate otherwise, as `--config.KEY=VALUE` each; the result
        names what differs from the run's own evaluation.
      command: The command that repeats the evaluation, for the result.
      given: A config that the user named; a warning says where it is not the run's.
      limits: `grace` and `stall_timeout` of `Preemption`.

    Raises:
      UserError: There is no such checkpoint, or other classes or another network were
        asked for.
      PreemptedError: A signal asked the evaluation to stop.
    """
    with (
        Preemption(workdir, **limits) as preemption,
        open_checkpoints(workdir) as saved,
    ):
        best = saved.best_step() if which == "best" else None
        step = saved.steps()[-1] if best is None else best
        with explaining_damage(saved.directory / str(step)):
            record = saved.read(step)
        config = from_saved(record["config"])
        override(config, list(overrides))
        changed = differences(record["config"], config)
        _check_network(record["config"], config, workdir)
        _check_given(config, given, workdir)
        setup = _set_up_as_trained(config, record, workdir)
        changed += _check_split(setup, record, changed)
        like = setup.state_like()
        wanted = {"ema": like.ema}
        if not like.ema:
            wanted = {"params": like.params, "batch_stats": like.batch_stats}
        with explaining_damage(saved.directory / str(step)):
            variables = saved.restore(step, wanted)
        state = TrainState(
            step=step,
            params=variables.get("params"),
            batch_stats=variables.get("batch_stats"),
            opt_state=None,
            ema=variables.get("ema"),
        )
        chief = jax.process_index() == 0
        say = output.say if chief else lambda text: None
        where = setup.test.source.where
        say(f"evaluating the checkpoint of step {step} on {where}")
        for line in changed:
            say(f"other than in training: {line}")
        preemption.check()
        eval_steps = setup.compile_eval_steps()
        preemption.check()
        result = evaluate(setup, eval_steps[()], state, after_batch=preemption.check)
        sets = evaluate_sets(setup, eval_steps, state, after_batch=preemption.check)
    content = {
        **result.scalars(),
        "step": step,
        "checkpoint": which,
        "split": where,
        "changed": changed,
        "bad_images": [setup.test.source.name(i) for i in result.bad_images],
        "sets": sets,
        "command": command,
    }
    if chief:
        name = re.sub(r"[^\w]+", "_", config.data.eval_split).strip("_")
        path = workdir / f"eval_{name}.json"
        with output.dispensable(str(path)):
            storage.write_json(path, content)
        for name, values in sets.items():
            say(f"{name}: {metric_writers.describe(values)}")
    return content


def _check_network(old: Mapping, config: ConfigDict, workdir: Path) -> None:
    """Raises UserError if overrides ask for other arrays than a run has."""
    asked = [x for x in differences(old, config) if x.startswith(NETWORK)]
    if config.ema_decay and not old.get("ema_decay"):
        asked.append("ema_decay: it has no averaged parameters")
    if asked:
        raise UserError(
            f"{workdir} holds another network ({'; '.join(asked)}); leave that"
            " override out."
        )


def _check_given(config: ConfigDict, given: ConfigDict | None, workdir: Path) -> None:
    """Tells where a config that the user named is not what is evaluated."""
    lines = differences(json.loads(as_json(config)), given) if given else []
    if not lines:
        return
    if of_network := [line for line in lines if line.startswith(NETWORK)]:
        raise UserError(
            f"{workdir} holds another network than --config"
            f" ({'; '.join(of_network)}). Leave --config out: the run's own is used."
        )
    log.warning(
        "--config differs from the run's own config (%s%s), which is used; give"
        " --config.KEY=VALUE for what is to differ.",
        *("; ".join(lines[:3]), " ..." if len(lines) > 3 else ""),
    )


def _set_up_as_trained(config: ConfigDict, record: Mapping, workdir: Path) -> Setup:
    """Returns a setup that evaluates the network of a checkpoint's record."""
    data = record.get("data")
    train = None
    if data:
        size, where = data["train"]["images"], config.data.source
        train = RecordedSplit(tuple(data["classes"]), size, where)
    mesh = sharding.make_mesh()
    setup = set_up(for_evaluation(config, mesh.size), mesh, train)
    if change := spec_change(record["spec"], setup.model.spec):
        raise UserError(
            f"{workdir} holds another network ({change}); evaluate it with the classes"
            " and the channels that it was trained for."
        )
    return setup


def _check_split(setup: Setup, record: Mapping, changed: Sequence[str]) -> list[str]:
    """Returns how the images of the split differ although the same were asked for."""
    keys = "data.source", "data.eval_source", "data.eval_split", "data.data_dir"
    if "data" not in record:
        log.warning(
            "This run was begun by a version that did not record the class names and"
            " the images, so whether they are the same now cannot be compared."
        )
        return []
    if any(line.startswith(keys) for line in changed):
        return []
    data = describe_data(setup.train.source, setup.test.source)
    return data_changes(record["data"], data, ["eval"])
