"""The learning rate as a function of the step, built from optax's schedules."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from resnet_jax.config.durations import to_steps
from resnet_jax.errors import UserError, check_known

# These fall to `optim.end_learning_rate` at the end of `optim.schedule_length`.
FALLING = ("cosine", "polynomial", "triangular")
SCHEDULES = (*FALLING, "step", "constant", "plateau")


def peak_rate(config: ConfigDict) -> float:
    """Returns the highest learning rate of a run.

    It is `learning_rate * batch_size / learning_rate_batch`, the linear scaling rule
    of Goyal et al. 2017 (arXiv:1706.02677, section 2.1), or `learning_rate` itself if
    `learning_rate_batch` is 0.

    Args:
      config: The run's configuration.
    """
    optim = config.optim
    if not optim.learning_rate_batch:
        return optim.learning_rate
    return optim.learning_rate * config.batch_size / optim.learning_rate_batch


def warmup_steps(config: ConfigDict, *, total_steps: int, train_size: int) -> int:
    """Returns the number of steps of `optim.warmup`.

    Args:
      config: The run's configuration.
      total_steps: The length of the run in steps.
      train_size: The number of training images, the length of an epoch.
    """
    duration, batch_size = config.optim.warmup, config.batch_size
    return to_steps(duration, batch_size, train_size, "optim.warmup", total_steps)


def make_schedule(
    config: ConfigDict, *, total_steps: int, train_size: int
) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    The rate rises linearly from `warmup_from` to `peak_rate` during `warmup`. Then
    `optim.schedule` sets it:

    - `cosine`, `polynomial` and `triangular` fall to `end_learning_rate` at
      `schedule_length` and stay there. `triangular` is a polynomial of power 1: the
      triangle of Page 2018, whose first side is the warm-up.
    - `step` multiplies the rate by `decay_factor` at each duration of `decay_at`.
    - `constant` keeps the peak. So does `plateau`, whose decays depend on evaluations
      (`Plateau`).

    All durations count from step 0. With `warmup_prefix=False` the schedule starts at
    step 0, too, and the warm-up replaces its beginning, as in timm. With `per_epoch`
    every step of an epoch has the rate of the epoch's first step, as with torch's
    schedulers that step once an epoch.

    Args:
      config: The run's configuration, of which `optim` and `batch_size` are read.
      total_steps: The length of the run in steps.
      train_size: The number of training images, the length of an epoch.

    Raises:
      UserError: The schedule is unknown, or durations contradict each other.
    """
    optim, batch_size = config.optim, config.batch_size

    def steps_of(duration, key: str) -> int:
        return to_steps(duration, batch_size, train_size, key, total_steps)

    check_known(f"optim.schedule={optim.schedule!r}", optim.schedule, SCHEDULES)
    if optim.schedule == "step" and not optim.decay_at:
        raise UserError(
            "optim.schedule=step needs optim.decay_at, such as"
            " ({'epochs': 30}, {'epochs': 60})."
        )
    peak = peak_rate(config)
    warmup = warmup_steps(config, total_steps=total_steps, train_size=train_size)
    if warmup and warmup >= total_steps:
        raise UserError(
            f"optim.warmup takes {warmup} steps, but the run (config.total) has only"
            f" {total_steps}; lengthen the run, or start one with a shorter warm-up."
        )
    length = total_steps
    if optim.schedule_length:
        length = steps_of(optim.schedule_length, "optim.schedule_length")
        if length <= warmup:
            raise UserError(
                f"optim.schedule_length takes {length} steps, all of which are"
                f" optim.warmup ({warmup}); lengthen optim.schedule_length or shorten"
                " optim.warmup."
            )
        if optim.schedule not in FALLING:
            raise UserError(
                f"optim.schedule={optim.schedule} has no end, so"
                " optim.schedule_length would have no effect; leave it empty."
            )
        if length < total_steps and not optim.end_learning_rate:
            raise UserError(
                f"optim.schedule_length ends at step {length} with a rate of 0, but the"
                f" run (config.total) has {total_steps} steps; lengthen"
                " optim.schedule_length, shorten the run, or set"
                " optim.end_learning_rate."
            )
    begin = warmup if optim.warmup_prefix else 0
    falling = max(length - begin, 1)

    if optim.schedule == "cosine":
        alpha = optim.end_learning_rate / peak if peak else 0.0
        after = optax.cosine_decay_schedule(peak, falling, alpha=alpha)
    elif optim.schedule in ("polynomial", "triangular"):
        power = optim.power if optim.schedule == "polynomial" else 1.0
        after = optax.polynomial_schedule(peak, optim.end_learning_rate, power, falling)
    elif optim.schedule == "step":
        factors: dict[int, float] = {}
        for duration in optim.decay_at:
            step = steps_of(duration, "optim.decay_at")
            if step >= total_steps:
                reached = tuple(
                    dict(earlier)
                    for earlier in optim.decay_at
                    if steps_of(earlier, "optim.decay_at") < total_steps
                )
                without = f'--config.optim.decay_at="{reached}"'
                if not reached:
                    without = "--config.optim.schedule=constant"
                raise UserError(
                    f"optim.decay_at={dict(duration)} is step {step}, but the run"
                    f" (config.total) has only {total_steps}; leave it out with"
                    f" {without}, or lengthen the run."
                )
            boundary = max(step - begin, 0)
            # Two decays may fall on the same step.
            factors[boundary] = factors.get(boundary, 1.0) * optim.decay_factor
        after = optax.piecewise_constant_schedule(peak, factors)
    else:
        after = optax.constant_schedule(peak)
    schedule = after
    if warmup:
        ramp = optax.linear_schedule(optim.warmup_from, peak, warmup)
        # join_schedules counts the steps of each schedule from its own beginning.
        after_warmup = after if begin else lambda step: after(step + warmup)
        schedule = optax.join_schedules([ramp, after_warmup], [warmup])
    if optim.per_epoch:
        schedule = _by_epoch(schedule, total_steps, batch_size, train_size)
    return schedule


def _by_epoch(
    schedule: optax.Schedule, total_steps: int, batch_size: int, train_size: int
) -> optax.Schedule:
    """Gives every step of an epoch the rate of the epoch's first step."""
    epochs = total_steps * batch_size // train_size + 1
    # Rounded to steps as all durations are.
    starts = np.array(
        [
            to_steps({"epochs": epoch}, batch_size, train_size, "epoch")
            for epoch in range(epochs)
        ]
    )

    def constant_in_epochs(step):
        epoch = jnp.searchsorted(starts, step, side="right") - 1
        return schedule(jnp.asarray(starts)[epoch])

    return constant_in_epochs


class Plateau:
    """Lowers the rate when the evaluated error stops falling (He et al. 2015).

    The rule is that of torch's ReduceLROnPlateau with a threshold of 0: after more than
    `patience` evaluations in a row without a new best top-1, the rate is multiplied by
    `decay_factor`. The memory is a dictionary in the checkpoint.

    Attributes:
      patience: The number of evaluations without a new best that are tolerated.
      decay_factor: The factor by which the rate is multiplied.
    """

    # optax.contrib.reduce_on_plateau is not used: it decides inside the train step, by
    # losses of training batches, and would add its memory to the optimiser's state.

    def __init__(self, optim: ConfigDict):
        self.patience, self.decay_factor = optim.patience, optim.decay_factor

    def after(self, memory: Mapping | None, top1: float) -> dict:
        """Returns the memory after one more evaluation.

        Args:
          memory: The memory so far: `best`, the highest top-1; `bad`, the number of
            evaluations since then; `factor`, by which the rate is multiplied. None
            before the first evaluation.
          top1: The evaluation's top-1, a fraction.
        """
        memory = dict(memory or {"best": -1.0, "bad": 0, "factor": 1.0})
        if top1 > memory["best"]:
            return memory | {"best": top1, "bad": 0}
        memory["bad"] += 1
        if memory["bad"] > self.patience:
            memory |= {"bad": 0, "factor": memory["factor"] * self.decay_factor}
        return memory
