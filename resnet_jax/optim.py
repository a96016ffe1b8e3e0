"""Schedules and optimisers, put together from optax."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from resnet_jax.config import to_steps
from resnet_jax.errors import UserError, nearest

# Parameters that weight decay leaves alone, by the last names of their paths.
DECAY_EXCLUDES = {
    "none": (),
    "norm": ("norm/scale", "norm/bias"),
    "norm+bias": ("norm/scale", "norm/bias", "bias"),
}


def make_schedule(
    config: ConfigDict, *, total_steps: int, train_size: int
) -> optax.Schedule:
    """Learning rate by step.

    The peak is `learning_rate * batch_size / learning_rate_batch` (Goyal et al. 2017,
    arXiv:1706.02677, section 2.1), or `learning_rate` if `learning_rate_batch` is 0.
    A linear warm-up leads from `warmup_from` to the peak. Behind it, `cosine` falls to
    zero at the end; `step` has been multiplied by `decay_factor` at each of `decay_at`,
    counted from step 0; `constant` stays.
    """
    optim, batch_size = config.optim, config.batch_size
    peak = optim.learning_rate
    if optim.learning_rate_batch:
        peak *= batch_size / optim.learning_rate_batch
    warmup = to_steps(optim.warmup, batch_size, train_size, "optim.warmup")
    if warmup and warmup >= total_steps:
        raise UserError(
            f"optim.warmup takes {warmup} steps, but the run (config.total) has only"
            f" {total_steps}; shorten the warm-up or lengthen the run."
        )

    if optim.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(total_steps - warmup, 1))
    elif optim.schedule == "step":
        if not optim.decay_at:
            raise UserError(
                "optim.schedule=step needs optim.decay_at, such as"
                " ({'epochs': 30}, {'epochs': 60})."
            )
        factors: dict[int, float] = {}
        for duration in optim.decay_at:
            at = to_steps(duration, batch_size, train_size, "optim.decay_at")
            behind = max(at - warmup, 0)
            # Two decays may fall on the same step.
            factors[behind] = factors.get(behind, 1.0) * optim.decay_factor
        after = optax.piecewise_constant_schedule(peak, factors)
    elif optim.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        known = ("cosine", "step", "constant")
        raise UserError(
            f"There is no optim.schedule={optim.schedule!r}."
            + nearest(optim.schedule, known)
        )
    if not warmup:
        return after
    ramp = optax.linear_schedule(optim.warmup_from, peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """SGD in torch's form: clip, add decay to the gradient, momentum, learning rate."""
    optim = config.optim
    if optim.weight_decay_exclude not in DECAY_EXCLUDES:
        raise UserError(
            f"There is no optim.weight_decay_exclude={optim.weight_decay_exclude!r}."
            + nearest(optim.weight_decay_exclude, DECAY_EXCLUDES)
        )
    parts = []
    if optim.clip_norm:
        parts.append(optax.clip_by_global_norm(optim.clip_norm))
    if optim.weight_decay:
        parts.append(
            optax.add_decayed_weights(
                optim.weight_decay,
                mask=lambda params: decayed(params, optim.weight_decay_exclude),
            )
        )
    if optim.momentum:
        parts.append(optax.trace(optim.momentum, nesterov=optim.nesterov))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)


def decayed(params, exclude: str):
    """A tree of booleans: which parameters weight decay applies to."""

    def one(path, _) -> bool:
        *parents, leaf = (key.key for key in path)
        norm = bool(parents) and "norm" in parents[-1]
        name = f"norm/{leaf}" if norm else leaf
        return name not in DECAY_EXCLUDES[exclude]

    return jax.tree_util.tree_map_with_path(one, params)


def update_ema(ema, new, decay: float, step: jax.Array):
    """Exponential moving average of parameters and running statistics.

    The decay grows with the step, min(decay, (1 + step) / (10 + step)), as
    TensorFlow's ExponentialMovingAverage does, so that the start is soon forgotten.
    """
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, x: decay * old + (1 - decay) * x, ema, new)
