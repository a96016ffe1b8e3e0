"""Exact evaluation: every image once."""

import dataclasses
import json
import re
from collections.abc import Callable, Collection, Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_jax import config as config_lib
from resnet_jax import sharding, storage, writers
from resnet_jax.checkpoints import Checkpoints
from resnet_jax.data.evalsets import summarize
from resnet_jax.data.loader import bad_indices
from resnet_jax.errors import UserError
from resnet_jax.preemption import Preemption
from resnet_jax.setup import Setup, set_up
from resnet_jax.step import TrainState
from resnet_jax.storage import Path


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


@dataclasses.dataclass
class Gallery:
    """Some evaluated images, right and wrong ones, for the report.

    Attributes:
      wanted: how many of each kind.
      rows: `image`, `label`, `predicted` and `probability` of each.
    """

    wanted: int = 8
    rows: list[dict] = dataclasses.field(default_factory=list)

    def add(self, batch: dict, predictions: dict) -> None:
        """Takes from a batch what is still wanted."""
        right = predictions["label"] == batch["label"]
        for kind in (True, False):
            missing = self.wanted - sum(row["right"] == kind for row in self.rows)
            for i in np.flatnonzero(batch["mask"] & (right == kind))[:missing]:
                image = batch["image"][i]
                self.rows.append(
                    {
                        # Of several views, the centre.
                        "image": image if image.ndim == 3 else image[0],
                        "label": int(batch["label"][i]),
                        "predicted": int(predictions["label"][i]),
                        "probability": float(predictions["probability"][i]),
                        "right": kind,
                    }
                )


def evaluate(
    setup: Setup,
    eval_step: Callable,
    state: TrainState,
    *,
    after_batch: Callable[[], None],
    gallery: Gallery | None = None,
    labels: Collection[int] | None = None,
) -> Evaluation:
    """Evaluates a state on the test split; sums are divided at the very end.

    Args:
      setup: of the run.
      eval_step: of `Setup.compile_eval_step`.
      state: whose averaged parameters are taken, if it has any.
      after_batch: called after each batch; may raise to stop.
      gallery: takes some of this process's images.
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
        if gallery:
            local = {key: sharding.local_values(x) for key, x in predictions.items()}
            gallery.add(batch, local)
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
    config: ConfigDict,
    workdir: Path,
    which: str,
    command: str = "",
    **limits: float,
) -> dict:
    """Evaluates a checkpoint of a workdir; writes `eval_SPLIT.json` there.

    Args:
      config: the run's; `data` and `evaluate` may say what else to evaluate, and how.
      workdir: of the run.
      which: `best` or `last`.
      command: what repeats the evaluation, for the result.
      limits: `grace` and `stall_timeout` of `Preemption`.

    Raises:
      UserError: there is no such checkpoint, or it holds another network.
      PreemptedError: a signal asked the evaluation to stop.
    """
    saved_config = workdir / "config.json"
    with storage.telling(workdir):
        there = saved_config.exists()
    if not there:
        raise UserError(f"{workdir} holds no run to evaluate (no config.json).")
    old = json.loads(saved_config.read_text())
    changed = [
        line
        for line in config_lib.differences(old, config)
        if line.startswith(("model.name", "model.overrides", "ema_decay"))
    ]
    if changed:
        raise UserError(f"{workdir} holds another network ({'; '.join(changed)}).")
    with Preemption(workdir, **limits) as preemption:
        setup = set_up(config)
        with Checkpoints.open(setup, workdir) as saved:
            steps = saved.steps()
            if not steps:
                raise UserError(f"{workdir} holds no checkpoint yet.")
            best = saved.best_step()
            step = steps[-1] if which == "last" or best is None else best
            state, progress = saved.restore(step, setup.state_like())
        if jax.process_index() == 0:
            where = setup.test.source.where
            writers.say(f"evaluating the checkpoint of step {step} on {where}")
        preemption.check()
        eval_steps = setup.compile_eval_steps()
        preemption.check()
        result = evaluate(setup, eval_steps[()], state, after_batch=preemption.check)
        sets = evaluate_sets(setup, eval_steps, state, after_batch=preemption.check)
    content = {
        **result.scalars(),
        "step": progress.step,
        "checkpoint": which,
        "split": setup.test.source.where,
        "bad_images": [setup.test.source.name(i) for i in result.bad_images],
        "sets": sets,
        "command": command,
    }
    if jax.process_index() == 0:
        name = re.sub(r"[^\w]+", "_", config.data.eval_split).strip("_")
        writers.write_json(workdir / f"eval_{name}.json", content)
        for name, values in sets.items():
            writers.say(f"{name}: {writers.describe(values)}")
    return content
