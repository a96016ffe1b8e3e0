"""Turns a config into an experiment: its data, model, schedule and optimiser.

Nothing is computed here. `programs.py` compiles what the devices run.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from resnet_jax.config import durations
from resnet_jax.config.sizes import eval_batch_size
from resnet_jax.data.cache import IN_MEMORY, cached
from resnet_jax.data.evalsets import EvaluationSet
from resnet_jax.data.loader import (
    Batches,
    Examples,
    ResizeSchedule,
    eval_batches,
    train_batches,
)
from resnet_jax.data.source_protocol import NamedSource
from resnet_jax.errors import UserError
from resnet_jax.models import create_model
from resnet_jax.parallel import sharding
from resnet_jax.training import (
    completion,
    freezing,
    ghost_batch,
    losses,
    mixup,
    optim,
    schedules,
    step,
    stopping,
    validate,
)
from resnet_jax.training.datasets import make_resize, open_examples, resolve_splits
from resnet_jax.training.freezing import NOTHING, Frozen
from resnet_jax.training.step import Teacher, TrainState


@dataclasses.dataclass
class Experiment:
    """The data, model, schedule and optimiser of a run on some devices.

    Sizes and durations of the config are resolved here: the model's ghost batch size is
    a number of examples, and durations are steps.

    Attributes:
      config: The run's config (`resnet_jax/config/defaults.py`), in which nothing is
        left for `completion.py` to fill.
      mesh: The devices of all processes.
      fused_mesh: The mesh, if convolutions are fused with their batch norm, or None.
      train: The examples of the training split, with their augmentation.
      eval: The examples of the eval split.
      sets: The extra evaluation sets of `config.evaluate.sets`, by name.
      model: The network.
      teacher: The network of `config.distill.teacher`, or None.
      total_steps: The length of the run in steps.
      schedule: The learning rate by step, without the factor of a plateau.
      plateau: The rule that lowers the learning rate after evaluations, or None.
      optimizer: The optimiser. It follows `schedule`.
      init: A function that returns the state before the first step. It is kept, since
        JAX traces one function once.
      eval_batch_size: Images per evaluation batch over all devices.
      every: The number of steps, which may be a fraction, between two evaluations
        (`evaluate`), checkpoints (`checkpoint`) and log lines (`log`); 0 for those at
        the end of the run alone.
      resize: The schedule of progressive resizing, or None.
      freeze: The parameters and statistics of `config.optim.freeze`.
      freeze_until: The step before which they are frozen; None for the complete run.
    """

    config: ConfigDict
    mesh: Mesh
    fused_mesh: Mesh | None
    train: Examples
    eval: Examples
    sets: dict[str, EvaluationSet]
    model: nn.Module
    teacher: Teacher | None
    total_steps: int
    schedule: optax.Schedule
    plateau: schedules.Plateau | None
    optimizer: optax.GradientTransformation
    init: Callable[[], TrainState]
    eval_batch_size: int
    every: dict[str, Fraction]
    resize: ResizeSchedule | None = None
    freeze: Frozen = NOTHING
    freeze_until: int | None = None

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, in the order of the labels."""
        return self.train.source.classes

    @functools.cached_property
    def class_weights(self) -> Float[np.ndarray, "classes"] | None:
        """The weight of each class in the loss (`data.class_weights`), or None."""
        # The labels are not counted in `set_up`, since an evaluation alone has none of
        # the training split, and a finished run needs no weights.
        data, classes = self.config.data, self.model.spec.num_classes
        if not data.class_weights:
            return None
        counts = losses.class_counts(self.train.source, classes)
        return losses.class_weights(counts, data.class_weights, data.class_weights_beta)

    def model_of_whole_batch(self) -> nn.Module:
        """Returns the model for a pass over a batch that is not cut into microbatches.

        With `bn_group_size=global` such a batch is one ghost batch.
        """
        if self.config.model.bn_group_size != "global":
            return self.model
        return self.model.clone(bn_group_size=self.config.batch_size)

    def learning_rate(self, step: int, plateau: Mapping | None) -> float:
        """Returns the learning rate with which the update after `step` steps is made.

        Args:
          step: The number of updates before this one.
          plateau: The result of `Plateau.after`, whose factor the optimiser's state
            holds; None before the first evaluation.
        """
        return float(self.schedule(step)) * (plateau["factor"] if plateau else 1.0)

    def image_size(self, step: int) -> int:
        """Returns the side in pixels of the training images of a step, from 0 on."""
        return self.resize(step) if self.resize else self.config.data.image_size

    def frozen(self, step: int) -> Frozen:
        """Returns what the update after `step` steps does not change."""
        until = self.freeze_until
        return self.freeze if until is None or step < until else NOTHING

    def is_due(self, action: str, step: int) -> bool:
        """Returns whether to `evaluate`, write a `checkpoint` or `log` after a step.

        Args:
          action: One of these three words.
          step: The number of updates so far.
        """
        if step == 0:
            return False
        return step == self.total_steps or durations.is_due(step, self.every[action])

    def has_ended(self, progress: Mapping) -> bool:
        """Returns whether a run with some progress learns no more.

        Args:
          progress: The fields of a `Progress` by name, as a checkpoint records them.
        """
        # Versions without early stopping have no memory of it.
        step, memory = progress["step"], progress.get("stopping")
        is_stopped = stopping.reason(self.config.stop, step, memory)
        return step >= self.total_steps or bool(is_stopped)

    @functools.cached_property
    def _cached_train_source(self) -> NamedSource:
        # The images are not decoded in `set_up`, since an evaluation alone never reads
        # the training images.
        data = self.config.data
        return cached(self.train.source, data.channels, data.cache, data.max_pixels)

    def trains_from_memory(self) -> bool:
        """Tells whether the training images are in memory, so that none is decoded."""
        return isinstance(self._cached_train_source, IN_MEMORY)

    def train_batches(self, first_step: int, last_step: int | None = None) -> Batches:
        """Returns this process's part of the training batches, for `with`.

        Args:
          first_step: The step of the first batch.
          last_step: The step after the last batch; None for the end of the run.
        """
        config = self.config
        return train_batches(
            dataclasses.replace(self.train, source=self._cached_train_source),
            seed=config.seed,
            batch_size=config.batch_size,
            steps=range(first_step, last_step or self.total_steps),
            rows=sharding.local_rows(self.mesh, config.batch_size),
            num_workers=config.data.num_workers,
            num_threads=config.data.num_threads,
            resize=self.resize,
        )

    def eval_batches(self, examples: Examples) -> Batches:
        """Returns batches that hold each of some examples once, for `with`."""
        return eval_batches(
            examples,
            batch_size=self.eval_batch_size,
            rows=sharding.local_rows(self.mesh, self.eval_batch_size),
            num_workers=self.config.data.num_workers,
            num_threads=self.config.data.num_threads,
        )

    def to_devices(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Moves `image` and `label` of a training batch to the devices.

        Args:
          batch: This process's part of the batch, of which a train step reads these.
        """
        arrays = {key: batch[key] for key in ("image", "label")}
        return sharding.to_devices(arrays, self.mesh, self.config.batch_size)

    def eval_to_devices(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Moves `image`, `label` and `mask` of an evaluation batch to the devices.

        Args:
          batch: This process's part of the batch, of which an evaluation step reads
            these.
        """
        arrays = {key: batch[key] for key in ("image", "label", "mask")}
        return sharding.to_devices(arrays, self.mesh, self.eval_batch_size)


def set_up(
    config: ConfigDict,
    mesh: Mesh | None = None,
    train: NamedSource | None = None,
    eval: NamedSource | None = None,
) -> Experiment:
    """Returns the experiment of a config, for which it opens the data.

    Args:
      config: The run's config (`resnet_jax/config/defaults.py`).
      mesh: The devices, which need not exist; by default those of all processes.
      train: The training split, in place of the config's; see `open_examples`.
      eval: The eval split, in place of the config's.

    Raises:
      UserError: The config contradicts itself, the data or the devices.
    """
    mesh = mesh or sharding.make_mesh()
    config = completion.complete(config)
    validate.check(config, mesh)
    bn_group_size = ghost_batch.resolve(config, mesh)
    mixup.check_ghost_batch(config, bn_group_size)
    if eval is None:
        config = resolve_splits(config, reads_train=train is None)
    train_examples, eval_examples, sets = open_examples(config, train, eval)
    train_size, batch_size = len(train_examples.source), config.batch_size
    config = completion.with_total(config, train_size)
    total_steps = durations.to_steps(config.total, batch_size, train_size, "total")
    if total_steps < 1:
        raise UserError("The run has no steps; config.total must be more than zero.")
    schedule = schedules.make_schedule(
        config, total_steps=total_steps, train_size=train_size
    )
    by_plateau = config.optim.schedule == "plateau"
    model = _make_model(config, train_examples.source, bn_group_size)
    freeze = freezing.frozen_of(config, model)
    freeze_until = freezing.frozen_until(config, train_size, total_steps)
    if freeze_until == 0:
        freeze = NOTHING
    late = freeze if freeze_until and freeze.leaves else None
    optimizer = optim.make_optimizer(config, schedule, late)
    if config.model.scan_blocks and optim.needs_single_blocks(config.optim):
        optimizer = optim.on_single_blocks(optimizer, model.spec)
    recurring = {
        "evaluate": (config.evaluate.every, "evaluate.every"),
        "checkpoint": (config.checkpoint.every, "checkpoint.every"),
        "log": (config.log_every, "log_every"),
    }
    return Experiment(
        config=config,
        mesh=mesh,
        fused_mesh=_fused_mesh(config, mesh),
        train=train_examples,
        eval=eval_examples,
        sets=sets,
        model=model,
        teacher=_make_teacher(config, model),
        total_steps=total_steps,
        schedule=schedule,
        plateau=schedules.Plateau(config.optim) if by_plateau else None,
        optimizer=optimizer,
        init=functools.partial(
            step.init_state,
            model,
            optimizer,
            seed=config.seed,
            image_size=config.data.image_size,
            ema=bool(config.ema_decay),
            frozen=freeze,
        ),
        eval_batch_size=eval_batch_size(config),
        every={
            action: durations.in_steps(
                duration, batch_size, train_size, key, total_steps
            )
            for action, (duration, key) in recurring.items()
        },
        resize=make_resize(config, train_size, total_steps),
        freeze=freeze,
        freeze_until=freeze_until if freeze.leaves else None,
    )


def _make_model(
    config: ConfigDict, source: NamedSource, bn_group_size: int
) -> nn.Module:
    """Returns the network for the classes of a source."""
    fields = {
        "num_classes": len(source.classes),
        "in_channels": config.data.channels,
        **config.model.overrides,
    }
    if fields["num_classes"] < len(source.classes):
        raise UserError(
            f"model.overrides.num_classes={fields['num_classes']} is too small:"
            f" {source.title} has {len(source.classes)} classes."
        )
    return create_model(
        config.model.name,
        dtype=validate.DTYPES[config.model.dtype],
        bn_group_size=bn_group_size,
        scan_blocks=config.model.scan_blocks,
        **fields,
    )


def _fused_mesh(config: ConfigDict, mesh: Mesh) -> Mesh | None:
    """Returns the mesh if `config.model.fused_norm` asks for fusion on it."""
    chosen = config.model.fused_norm
    if chosen == "chip":
        on_tpu = sharding.platform_of(mesh) == "tpu"
        chosen = on_tpu and config.model.dtype == "bfloat16"
    return mesh if chosen else None


def _make_teacher(config: ConfigDict, student: nn.Module) -> Teacher | None:
    """Returns the network of `config.distill.teacher`, if there is one."""
    distill = config.distill
    if not distill.teacher:
        return None
    model = create_model(
        distill.teacher,
        dtype=student.dtype,
        **dict(distill.overrides),
        num_classes=student.spec.num_classes,
        in_channels=student.spec.in_channels,
    )
    return Teacher(model=model, weight=distill.weight, temperature=distill.temperature)
