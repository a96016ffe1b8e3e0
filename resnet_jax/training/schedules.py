"""Learning rates by step, put together from optax."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from resnet_jax.config.durations import to_steps
from resnet_jax.errors import UserError, check_known

FALLING = ("cosine", "polynomial", "triangular")  # to `schedule_length`
SCHEDULES = (*FALLING, "step", "constant", "plateau")


def peak_rate(config: ConfigDict) -> float:
    """The highest learning rate of a run.

    `learning_rate * batch_size / learning_rate_batch` (Goyal et al. 2017,
    arXiv:1706.02677, section 2.1), or `learning_rate` if `learning_rate_batch` is 0.
    """
    optim = config.optim
    if not optim.learning_rate_batch:
        return optim.learning_rate
    return optim.learning_rate * config.batch_size / optim.learning_rate_batch


def make_schedule(
    config: ConfigDict, *, total_steps: int, train_size: int
) -> optax.Schedule:
    """Learning rate by step.

    A linear warm-up leads from `warmup_from` to `peak_rate`. Behind it, `cosine`,
    `polynomial` and `triangular` (a polynomial of power 1: Page 2018's triangle, with
    the warm-up as its first side) fall to `end_learning_rate` at `schedule_length`, and
    stay there. With `warmup_prefix=False` they fall from step 0 on, and the warm-up
    takes the place of their beginning, as in timm. `step` has been multiplied by
    `decay_factor` at each of `decay_at`. `constant` stays, as does `plateau`, whose
    decays follow from evaluations (`Plateau`). All durations count from step 0.

    With `per_epoch` the rate is that of the epoch's first step throughout the epoch, as
    where torch's schedulers step once an epoch.

    Raises UserError for a schedule that there is not, and if durations contradict each
    other.
    """
    optim, batch_size = config.optim, config.batch_size

    def steps_of(duration, key: str) -> int:
        return to_steps(duration, batch_size, train_size, key)

    check_known(f"optim.schedule={optim.schedule!r}", optim.schedule, SCHEDULES)
    if optim.schedule == "step" and not optim.decay_at:
        raise UserError(
            "optim.schedule=step needs optim.decay_at, such as"
            " ({'epochs': 30}, {'epochs': 60})."
        )
    peak = peak_rate(config)
    warmup = steps_of(optim.warmup, "optim.warmup")
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
                f" optim.warmup ({warmup}); lengthen the one or shorten the other."
            )
        if optim.schedule not in FALLING:
            raise UserError(
                f"optim.schedule={optim.schedule} has no end, so that"
                " optim.schedule_length would be passed over; leave it empty."
            )
        if length < total_steps and not optim.end_learning_rate:
            raise UserError(
                f"optim.schedule_length ends at step {length} with a rate of 0, but the"
                f" run (config.total) goes on to {total_steps}; lengthen the one,"
                " shorten the other, or set optim.end_learning_rate."
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
            at = steps_of(duration, "optim.decay_at")
            if at >= total_steps:
                reached = tuple(
                    dict(one)
                    for one in optim.decay_at
                    if steps_of(one, "optim.decay_at") < total_steps
                )
                without = f'--config.optim.decay_at="{reached}"'
                if not reached:
                    without = "--config.optim.schedule=constant"
                raise UserError(
                    f"optim.decay_at={dict(duration)} is step {at}, but the run"
                    f" (config.total) has only {total_steps}; leave it out with"
                    f" {without}, or lengthen the run."
                )
            behind = max(at - begin, 0)
            # Two decays may fall on the same step.
            factors[behind] = factors.get(behind, 1.0) * optim.decay_factor
        after = optax.piecewise_constant_schedule(peak, factors)
    else:
        after = optax.constant_schedule(peak)
    schedule = after
    if warmup:
        ramp = optax.linear_schedule(optim.warmup_from, peak, warmup)
        behind = after if begin else _later(after, warmup)
        schedule = optax.join_schedules([ramp, behind], [warmup])
    if optim.per_epoch:
        schedule = _by_epoch(schedule, total_steps, batch_size, train_size)
    return schedule


def _later(schedule: optax.Schedule, steps: int) -> optax.Schedule:
    return lambda step: schedule(step + steps)


def _by_epoch(
    schedule: optax.Schedule, total_steps: int, batch_size: int, train_size: int
) -> optax.Schedule:
    """The rate of the first step of each epoch, rounded as durations are."""
    epochs = int(total_steps * batch_size / train_size) + 1
    starts = [
        to_steps({"epochs": epoch}, batch_size, train_size, "epoch")
        for epoch in range(epochs)
    ]
    starts = np.array(starts)

    def constant_in_epochs(step):
        epoch = jnp.searchsorted(starts, step, side="right") - 1
        return schedule(jnp.asarray(starts)[epoch])

    return constant_in_epochs


class Plateau:
    """Lowers the rate when the evaluated error no longer falls (He et al. 2015).

    The rule is that of torch's ReduceLROnPlateau with a threshold of 0: more than
    `patience` evaluations in a row without a higher top-1 than the best multiply the
    rate by `decay_factor`. What it remembers is a dictionary in the checkpoint.
    """

    def __init__(self, optim: ConfigDict):
        self.patience, self.decay_factor = optim.patience, optim.decay_factor

    def after(self, memory: Mapping | None, top1: float) -> dict:
        """What is remembered after one more evaluation: `best`, `bad`, `factor`."""
        memory = dict(memory or {"best": -1.0, "bad": 0, "factor": 1.0})
        if top1 > memory["best"]:
            return memory | {"best": top1, "bad": 0}
        memory["bad"] += 1
        if memory["bad"] > self.patience:
            memory |= {"bad": 0, "factor": memory["factor"] * self.decay_factor}
        return memory
