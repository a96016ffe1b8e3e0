"""Optimisers, put together from optax."""

import functools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from resnet_jax.errors import UserError, check_known
from resnet_jax.models.scan import stack_blocks, unstack_blocks
from resnet_jax.models.zoo import Spec
from resnet_jax.training.schedules import peak_rate

OPTIMIZERS = ("sgd", "lars", "lamb", "adam", "adamw", "keras_adam", "rmsprop_tf")
DECAYS = ("coupled", "decoupled", "schedule")
MOMENTUM_FORMS = ("", "torch", "caffe")
EMA_WARMUPS = ("tf", "timm", "copy", "none")
# Parameters that weight decay leaves alone, by the last names of their paths.
DECAY_EXCLUDES = {
    "none": (),
    "norm": ("norm/scale", "norm/bias"),
    "norm+bias": ("norm/scale", "norm/bias", "bias"),
    "ndim<=1": ("bias",),
}
# What each optimiser takes for optim.eps=0: torch's, timm's, and MLPerf's of LARS.
EPS = {
    **{"adam": 1e-8, "adamw": 1e-8, "keras_adam": 1e-7},
    **{"lamb": 1e-6, "rmsprop_tf": 1e-10, "lars": 0.0},
}


def check(config: ConfigDict) -> None:
    """Raises UserError for what `config.optim` and the average cannot be."""
    optim = config.optim
    for key, value, known in (
        ("optim.name", optim.name, OPTIMIZERS),
        ("optim.decay", optim.decay, DECAYS),
        ("optim.weight_decay_exclude", optim.weight_decay_exclude, DECAY_EXCLUDES),
        ("optim.momentum_form", optim.momentum_form, MOMENTUM_FORMS),
        ("ema_warmup", config.ema_warmup, EMA_WARMUPS),
    ):
        check_known(f"{key}={value!r}", value, known)
    for key, value in (
        ("optim.clip_norm", optim.clip_norm),
        ("optim.agc", optim.agc),
        ("optim.sam_rho", optim.sam_rho),
        ("optim.weight_decay", optim.weight_decay),
        ("optim.eps", optim.eps),
        ("optim.patience", optim.patience),
    ):
        if value < 0:
            raise UserError(f"{key}={value} must be at least 0.")
    for key, value in (
        ("optim.sam_every", optim.sam_every),
        ("ema_every", config.ema_every),
    ):
        if value < 1:
            raise UserError(f"{key}={value} must be at least 1.")
    for key, value in (
        ("optim.momentum", optim.momentum),
        ("optim.rms_decay", optim.rms_decay),
        ("ema_decay", config.ema_decay),
        *(("optim.betas", beta) for beta in optim.betas),
    ):
        if not 0 <= value < 1:
            raise UserError(f"{key}={value} must be at least 0 and less than 1.")
    if not 0 < optim.layer_decay <= 1:
        raise UserError(
            f"optim.layer_decay={optim.layer_decay} must be more than 0 and at most 1."
        )
    if optim.agc and optim.clip_norm:
        raise UserError(
            f"optim.agc={optim.agc} and optim.clip_norm={optim.clip_norm} both clip"
            " the gradient; set one of them to 0."
        )
    if optim.name == "adamw" and optim.decay == "coupled":
        raise UserError(
            "optim.name=adamw is Adam without optim.decay=coupled; set"
            " optim.decay=decoupled, or optim.name=adam."
        )
    if optim.name in ("lars", "lamb") and optim.decay != "coupled":
        raise UserError(
            f"optim.name={optim.name} counts weight decay in its trust ratio, which"
            f" optim.decay={optim.decay} would not be; set optim.decay=coupled."
        )
    if optim.name == "lamb" and not optim.weight_decay:
        raise UserError(
            "optim.name=lamb adapts what optim.weight_decay applies to, and that is 0;"
            " set it, or optim.name=adam."
        )
    if optim.schedule == "plateau" and optim.decay != "coupled":
        raise UserError(
            f"optim.schedule=plateau changes a rate that optim.decay={optim.decay}"
            " does not follow; set optim.decay=coupled."
        )


# Schedules.


class RateFactor(NamedTuple):
    """The part of an optimiser's state that `set_rate_factor` writes."""

    factor: jax.Array


def scale_by_rate_factor() -> optax.GradientTransformation:
    """Scales updates by a number in the state, which is 1 at first."""

    def update(updates, state: RateFactor, params=None):
        del params
        return jax.tree.map(lambda x: x * state.factor, updates), state

    return optax.GradientTransformation(
        lambda params: RateFactor(jnp.ones((), jnp.float32)), update
    )


def set_rate_factor(opt_state, factor: float):
    """An optimiser's state with another factor of the rate, where it was."""

    def one(part):
        if not isinstance(part, RateFactor):
            return part
        value = np.float32(factor)
        return RateFactor(jax.device_put(value, part.factor.sharding))

    return jax.tree.map(one, opt_state, is_leaf=lambda x: isinstance(x, RateFactor))


def scale_by_keras_adam(
    b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Adam that adds eps before the second moment is corrected for its bias.

    Kingma & Ba 2014 (arXiv:1412.6980), end of section 2. Keras has this form; torch and
    `optax.scale_by_adam` correct first, which makes a difference in the first steps.
    """

    def update(updates, state: optax.ScaleByAdamState, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2).init, update)


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Clips, adds decay, divides or adapts, keeps momentum, scales by the rate.

    `optim.name`:
      sgd: torch's.
      lars: You et al. 2017 (arXiv:1708.03888) as MLPerf has it: the gradient with its
        decay is scaled by c |w| / (|g| + decay |w| + eps). What decay leaves alone is
        not scaled either.
      lamb: You et al. 2019 (arXiv:1904.00962) as timm has it: the gradient's global
        norm is clipped at 1 (or `clip_norm`), moments are corrected for their bias, and
        what decay leaves alone has no trust ratio.
      adam, adamw: torch's; the latter's decay is not coupled.
      keras_adam: Keras's, see `scale_by_keras_adam`.
      rmsprop_tf: TensorFlow's and timm's: eps inside the root, squares start at 1.

    `optim.decay` is `coupled` (L2: added to the gradient; LAMB's is added behind the
    moments), `decoupled` (Loshchilov & Hutter 2017, arXiv:1711.05101, scaled by the
    rate as torch's AdamW) or `schedule` (scaled by the rate / its peak, as big_vision
    and Composer's DecoupledSGDW).

    `optim.momentum_form` puts the rate outside of the momentum (`torch`) or inside
    (`caffe`), which differ when the rate changes (Goyal et al. 2017, section 3); empty:
    inside for lars and rmsprop_tf, as in their sources.
    """
    check(config)
    optim = config.optim
    name, weight_decay = optim.name, optim.weight_decay
    mask = functools.partial(decayed, exclude=optim.weight_decay_exclude)
    eps = optim.eps or EPS.get(name)
    coupled = weight_decay and optim.decay == "coupled"

    parts = []
    clip_norm = optim.clip_norm or (name == "lamb") * 1.0
    if clip_norm:
        parts.append(optax.clip_by_global_norm(clip_norm))
    if optim.agc:
        parts.append(optax.masked(optax.adaptive_grad_clip(optim.agc), not_head))
    if coupled and name not in ("lars", "lamb"):
        parts.append(optax.add_decayed_weights(weight_decay, mask=mask))

    if name == "lars":
        ratio = scale_by_lars_ratio(weight_decay, optim.trust_coefficient, eps)
        parts.append(optax.masked(ratio, mask))
    elif name in ("adam", "adamw", "lamb"):
        parts.append(optax.scale_by_adam(*optim.betas, eps))
        if name == "lamb":
            adapted = optax.chain(
                optax.add_decayed_weights(weight_decay), optax.scale_by_trust_ratio()
            )
            parts.append(optax.masked(adapted, mask))
    elif name == "keras_adam":
        parts.append(scale_by_keras_adam(*optim.betas, eps))
    elif name == "rmsprop_tf":
        parts.append(optax.scale_by_rms(optim.rms_decay, eps, initial_scale=1.0))

    rate = [optax.scale_by_learning_rate(schedule)]
    if optim.schedule == "plateau":
        rate.append(scale_by_rate_factor())
    momentum = []
    if optim.momentum and name in ("sgd", "lars", "rmsprop_tf"):
        nesterov = optim.nesterov and name != "rmsprop_tf"
        momentum.append(optax.trace(optim.momentum, nesterov=nesterov))
    form = optim.momentum_form or ("torch" if name == "sgd" else "caffe")
    parts += momentum + rate if form == "torch" else rate + momentum

    if weight_decay and optim.decay == "decoupled":
        parts.append(
            optax.add_decayed_weights(
                lambda step: -weight_decay * schedule(step), mask=mask
            )
        )
    if optim.layer_decay != 1:
        parts.append(scale_by_layer(optim.layer_decay))
    if weight_decay and optim.decay == "schedule":
        per_rate = weight_decay / peak_rate(config)
        parts.append(
            optax.add_decayed_weights(
                lambda step: -per_rate * schedule(step), mask=mask
            )
        )
    return optax.chain(*parts)


def make_decay(config: ConfigDict, schedule: optax.Schedule) -> optax.Schedule | None:
    """What part of a weight that has no gradient a step takes away, in the long run.

    Decay that is coupled goes through momentum, which makes 1 / (1 - momentum) of it;
    LARS and LAMB scale it by their trust ratio, which is left out here. None: there is
    no decay, or adaptive methods make of it what their gradients let them.
    """
    optim = config.optim
    factor = optim.weight_decay
    if optim.decay == "schedule":
        factor /= peak_rate(config)
    elif optim.decay == "coupled" and optim.name in ("sgd", "lars"):
        factor /= 1 - optim.momentum
    elif optim.decay == "coupled" and optim.name != "lamb":
        return None
    return (lambda step: factor * schedule(step)) if factor else None


def scale_by_lars_ratio(
    weight_decay: float, trust_coefficient: float, eps: float
) -> optax.GradientTransformation:
    """Adds decay and scales by c |w| / (|g| + decay |w| + eps), or by 1 where 0.

    optax.lars divides by the norm of the sum instead.
    """

    def one(grad, param):
        of_param, of_grad = optax.safe_norm(param, 0.0), optax.safe_norm(grad, 0.0)
        ratio = trust_coefficient * of_param / (of_grad + weight_decay * of_param + eps)
        ratio = jnp.where((of_param > 0) & (of_grad > 0), ratio, 1.0)
        return ratio * (grad + weight_decay * param)

    return optax.stateless(lambda grads, params: jax.tree.map(one, grads, params))


def scale_by_layer(layer_decay: float) -> optax.GradientTransformation:
    """Scales each layer's update by `layer_decay` ** (layers behind it).

    See `layer_numbers` for what a layer is; Clark et al. 2020 (arXiv:2003.10555).
    """

    def update(updates, params):
        del params
        numbers = layer_numbers(updates)
        last = max(jax.tree.leaves(numbers))
        return jax.tree.map(
            lambda x, number: x * layer_decay ** (last - number), updates, numbers
        )

    return optax.stateless(update)


def layer_numbers(params):
    """A tree of integers: which layer each parameter belongs to.

    The stem is 0, each block the next number, and the head the last one; a final norm
    or convolution counts with the last block, as timm groups parameters.
    """
    places = {_block_of(name) for name in params} - {None}
    order = {place: number for number, place in enumerate(sorted(places), 1)}

    def one(path, _) -> int:
        name = path[0].key
        if name.startswith("stem"):
            return 0
        if name.startswith("final"):
            return len(order)
        return order.get(_block_of(name), len(order) + 1)

    return jax.tree_util.tree_map_with_path(one, params)


def _block_of(name: str) -> tuple[int, int] | None:
    match = re.match(r"stage(\d+)_[a-z]+(\d+)", name)
    return (int(match[1]), int(match[2])) if match else None


def decayed(params, exclude: str):
    """A tree of booleans: which parameters weight decay applies to."""

    def one(path, leaf) -> bool:
        *parents, last = (key.key for key in path)
        norm = bool(parents) and "norm" in parents[-1]
        name = f"norm/{last}" if norm else last
        if exclude == "ndim<=1" and leaf.ndim <= 1:
            return False
        return name not in DECAY_EXCLUDES[exclude]

    return jax.tree_util.tree_map_with_path(one, params)


def not_head(params):
    """A tree of booleans: which parameters are not those of the head."""
    return {
        name: jax.tree.map(lambda _, name=name: name != "head", tree)
        for name, tree in params.items()
    }


def looks_at_layers(optim: ConfigDict) -> bool:
    """Whether an update depends on more of a parameter than each single value."""
    by_norm = optim.name in ("lars", "lamb") or optim.agc
    return bool(
        by_norm or optim.layer_decay != 1 or optim.weight_decay_exclude == "ndim<=1"
    )


def on_single_blocks(
    optimizer: optax.GradientTransformation, spec: Spec
) -> optax.GradientTransformation:
    """An optimiser that sees each block, for parameters in which blocks are stacked."""

    def unstack(params):
        return unstack_blocks({"params": params}, spec)["params"]

    def update(updates, state, params=None):
        updates, state = optimizer.update(unstack(updates), state, unstack(params))
        return stack_blocks({"params": updates}, spec)["params"], state

    return optax.GradientTransformation(
        lambda params: optimizer.init(unstack(params)), update
    )


# Averages.


def update_ema(
    ema,
    new,
    decay: float,
    step: jax.Array,
    *,
    every: int = 1,
    warmup: str = "tf",
    copy_until: int = 0,
):
    """Exponential moving average of parameters and running statistics.

    Args:
      ema: the average so far.
      new: the values after this step.
      decay: what stays of the average in the long run.
      step: number of updates before this one.
      every: the average moves at each step that is a multiple, as in torchvision.
      warmup: how the start is forgotten. `tf`: the decay is at most
        (1 + step) / (10 + step), as TensorFlow's ExponentialMovingAverage; `timm`: at
        most 1 - (1 + step) ** (-2 / 3), as its ModelEmaV3; `copy`: the average is a
        copy until the first time behind `copy_until`, as torchvision's is until the
        learning rate has warmed up; `none`.
      copy_until: of `copy`.
    """
    if warmup == "tf":
        decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    elif warmup == "timm":
        decay = jnp.minimum(decay, 1 - (1.0 + step) ** (-2 / 3))
    elif warmup == "copy":
        decay = jnp.where(step - every < copy_until, 0.0, decay)
    if every > 1:
        decay = jnp.where(step % every == 0, decay, 1.0)
    return jax.tree.map(lambda old, x: decay * old + (1 - decay) * x, ema, new)
