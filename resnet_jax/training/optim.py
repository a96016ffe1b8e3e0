"""Optimisers, built from optax's transformations, and the EMA of parameters."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from resnet_jax.errors import UserError, check_known
from resnet_jax.models.scan import stack_blocks, unstack_blocks
from resnet_jax.models.zoo import Spec
from resnet_jax.training import freezing
from resnet_jax.training.freezing import Frozen
from resnet_jax.training.schedules import peak_rate

DECAYS = ("coupled", "decoupled", "schedule")
MOMENTUM_FORMS = ("", "torch", "caffe")
EMA_WARMUPS = ("tf", "timm", "copy", "none")
# Parameters without weight decay by `optim.weight_decay_exclude`, as the last names of
# their paths; `ndim<=1` excludes all vectors, too.
DECAY_EXCLUDES = {
    "none": (),
    "norm": ("norm/scale", "norm/bias"),
    "norm+bias": ("norm/scale", "norm/bias", "bias"),
    "ndim<=1": ("bias",),
}
# The decay rate of rmsprop_tf's mean of squares, and the trust coefficient of lars:
# those of timm, torchvision's references and MLPerf.
RMS_DECAY = 0.9
TRUST_COEFFICIENT = 0.001

# A pytree of arrays: parameters, gradients, updates or an optimiser's state.
Tree = Any


def check(config: ConfigDict) -> None:
    """Checks the keys of `config.optim` and of the EMA.

    Raises:
      UserError: A name is unknown, or two keys contradict each other.
    """
    optim = config.optim
    for key, value, known in (
        ("optim.name", optim.name, OPTIMIZERS),
        ("optim.decay", optim.decay, DECAYS),
        ("optim.weight_decay_exclude", optim.weight_decay_exclude, DECAY_EXCLUDES),
        ("optim.momentum_form", optim.momentum_form, MOMENTUM_FORMS),
        ("ema_warmup", config.ema_warmup, EMA_WARMUPS),
    ):
        check_known(f"{key}={value!r}", value, known)
    if optim.agc and optim.clip_norm:
        raise UserError(
            f"optim.agc={optim.agc} and optim.clip_norm={optim.clip_norm} both clip"
            " the gradient; set one of them to 0."
        )
    if optim.head_learning_rate and not optim.learning_rate:
        raise UserError(
            f"optim.head_learning_rate={optim.head_learning_rate} follows the schedule"
            " of optim.learning_rate, which is 0. To train only the head, set"
            " optim.freeze=all_but_head and optim.learning_rate."
        )
    row = OPTIMIZERS[optim.name]
    if not row.coupled and optim.decay == "coupled":
        raise UserError(
            f"optim.name={optim.name} has no optim.decay=coupled, which is L2"
            " regularisation; set optim.decay=decoupled, or another optim.name."
        )
    if row.trust_ratio and optim.decay != "coupled":
        raise UserError(
            f"optim.name={optim.name} includes weight decay in its trust ratio, but"
            f" optim.decay={optim.decay} is applied outside of it; set"
            " optim.decay=coupled."
        )
    if row.needs_decay and not optim.weight_decay:
        raise UserError(
            f"optim.name={optim.name} adapts only the parameters with weight decay, but"
            " optim.weight_decay is 0; set it, or another optim.name."
        )
    if optim.schedule == "plateau" and optim.decay != "coupled":
        raise UserError(
            "optim.schedule=plateau changes the learning rate after evaluations, and"
            f" optim.decay={optim.decay} would not follow; set optim.decay=coupled."
        )
    if optim.schedule == "plateau" and not any(config.evaluate.every.values()):
        raise UserError(
            "optim.schedule=plateau changes the learning rate after evaluations, but"
            f" evaluate.every={dict(config.evaluate.every)} evaluates only at the end;"
            " set it to a duration, such as {'epochs': 1}."
        )


class RateFactor(NamedTuple):
    """The state of `scale_by_rate_factor`.

    Attributes:
      factor: The factor of the learning rate, a float32 scalar.
    """

    factor: jax.Array


def scale_by_rate_factor() -> optax.GradientTransformation:
    """Scales updates by a factor in the state, which starts at 1.

    Evaluations set it with `set_rate_factor`. `optax.inject_hyperparams` would do, too,
    but it changes the tree of the state, which checkpoints hold.
    """

    def update(updates: Tree, state: RateFactor, params: Tree = None):
        del params
        return jax.tree.map(lambda x: x * state.factor, updates), state

    return optax.GradientTransformation(
        lambda params: RateFactor(jnp.ones((), jnp.float32)), update
    )


def set_rate_factor(opt_state: Tree, factor: float) -> Tree:
    """Returns an optimiser's state with another factor of the learning rate.

    Args:
      opt_state: The state of an optimiser with `scale_by_rate_factor`, on devices.
      factor: The new factor; it gets the sharding of the old one.
    """

    def replace(part):
        if not isinstance(part, RateFactor):
            return part
        value = np.float32(factor)
        return RateFactor(jax.device_put(value, part.factor.sharding))

    return jax.tree.map(replace, opt_state, is_leaf=lambda x: isinstance(x, RateFactor))


def scale_by_keras_adam(
    b1: float, b2: float, eps: float
) -> optax.GradientTransformation:
    """Scales updates as Adam does in Keras: eps is added before the bias correction.

    Kingma & Ba 2014 (arXiv:1412.6980), end of section 2. torch and
    `optax.scale_by_adam` correct the second moment first, so that the first steps
    differ.

    Args:
      b1: The decay rate of the mean of gradients.
      b2: The decay rate of the mean of squared gradients.
      eps: The number that is added to the root of the uncorrected second moment.
    """

    def update(updates: Tree, state: optax.ScaleByAdamState, params: Tree = None):
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment(updates, state.nu, b2, 2)
        scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(optax.scale_by_adam(b1, b2).init, update)


def scale_by_lars_ratio(
    weight_decay: float, eps: float, trust_coefficient: float = TRUST_COEFFICIENT
) -> optax.GradientTransformation:
    """Adds weight decay and scales by c |w| / (|g| + decay |w| + eps).

    The norms are those of a parameter w and of its gradient g. If one of them is 0, the
    factor is 1. `optax.scale_by_trust_ratio`, on which optax.lars is built, divides by
    the norm of the sum, |g + decay w|.

    Args:
      weight_decay: The coefficient of L2 regularisation.
      eps: The number that is added to the divisor.
      trust_coefficient: The factor c.
    """

    def scale(grad, param):
        param_norm, grad_norm = optax.safe_norm(param, 0.0), optax.safe_norm(grad, 0.0)
        ratio = (
            trust_coefficient
            * param_norm
            / (grad_norm + weight_decay * param_norm + eps)
        )
        ratio = jnp.where((param_norm > 0) & (grad_norm > 0), ratio, 1.0)
        return ratio * (grad + weight_decay * param)

    return optax.stateless(lambda grads, params: jax.tree.map(scale, grads, params))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A row of `OPTIMIZERS`: what sets an optimiser apart from the others.

    Attributes:
      scale: Returns the transformation that scales gradients by their statistics, given
        both decay rates of `optim.betas` and the epsilon. None: they are not scaled.
      trust_ratio: Returns the transformation that adds weight decay and scales by the
        ratio of norms, given the coefficient of weight decay and the epsilon. It is
        applied to parameters with weight decay. None: there is no such ratio.
      momentum_form: The value of `optim.momentum_form` that the optimiser's source has;
        empty if the optimiser has no momentum of its own.
      nesterov: True if it has Nesterov momentum.
      eps: The epsilon for `optim.eps=0`: that of the optimiser's source.
      clip_norm: The L2 norm to which gradients are clipped for `optim.clip_norm=0`; 0:
        they are not clipped.
      coupled: False if `optim.decay=coupled` makes no sense.
      needs_decay: True if `optim.weight_decay` must not be 0.
    """

    scale: Callable[[float, float, float], optax.GradientTransformation] | None = None
    trust_ratio: Callable[[float, float], optax.GradientTransformation] | None = None
    momentum_form: str = ""
    nesterov: bool = False
    eps: float = 0.0
    clip_norm: float = 0.0
    coupled: bool = True
    needs_decay: bool = False


OPTIMIZERS = {
    # torch's.
    "sgd": Optimizer(momentum_form="torch", nesterov=True),
    # You et al. 2017 (arXiv:1708.03888) as in MLPerf. Parameters without weight decay
    # have no trust ratio. timm's has `optim.momentum_form=torch`.
    "lars": Optimizer(
        trust_ratio=scale_by_lars_ratio, momentum_form="caffe", nesterov=True
    ),
    # You et al. 2019 (arXiv:1904.00962) as in timm: moments are corrected for their
    # bias, and parameters without weight decay have no trust ratio.
    "lamb": Optimizer(
        optax.scale_by_adam,
        lambda decay, eps: optax.chain(
            optax.add_decayed_weights(decay), optax.scale_by_trust_ratio()
        ),
        eps=1e-6,
        clip_norm=1.0,
        needs_decay=True,
    ),
    # torch's.
    "adam": Optimizer(optax.scale_by_adam, eps=1e-8),
    "adamw": Optimizer(optax.scale_by_adam, eps=1e-8, coupled=False),
    # Keras's.
    "keras_adam": Optimizer(scale_by_keras_adam, eps=1e-7),
    # TensorFlow's and timm's: eps is inside the root, and the mean of squares starts at
    # 1. It has no Nesterov momentum.
    "rmsprop_tf": Optimizer(
        lambda b1, b2, eps: optax.scale_by_rms(RMS_DECAY, eps, initial_scale=1.0),
        momentum_form="caffe",
        eps=1e-10,
    ),
}


def make_optimizer(
    config: ConfigDict, schedule: optax.Schedule, late: Frozen | None = None
) -> optax.GradientTransformation:
    """Returns the optimiser of a config.

    It clips the gradient, adds weight decay, scales by the statistics of gradients,
    applies momentum and multiplies by the learning rate.

    `optim.name` is a key of `OPTIMIZERS`.

    `optim.decay` is one of:

    - `coupled`: L2 regularisation, added to the gradient (LAMB: after the moments).
    - `decoupled`: Loshchilov & Hutter 2017 (arXiv:1711.05101), scaled by the learning
      rate as in torch's AdamW.
    - `schedule`: scaled by the learning rate divided by its peak, as in big_vision and
      in Composer's DecoupledSGDW.

    `optim.momentum_form` applies the learning rate after the momentum (`torch`) or
    before it (`caffe`), which differ when the rate changes (Goyal et al. 2017,
    arXiv:1706.02677, section 3). The empty string means the form of the optimiser's
    source.

    Args:
      config: The run's configuration.
      schedule: The learning rate as a function of the step.
      late: The parameters that thaw during the run, if there are any.

    Raises:
      UserError: Keys of `config.optim` are illegal or contradict each other.
    """
    check(config)
    optim = config.optim
    row, weight_decay = OPTIMIZERS[optim.name], optim.weight_decay
    mask = functools.partial(decayed, exclude=optim.weight_decay_exclude)
    eps = optim.eps or row.eps
    b1, b2 = optim.betas

    parts = []
    if clip_norm := optim.clip_norm or row.clip_norm:
        parts.append(optax.clip_by_global_norm(clip_norm))
    if optim.agc:
        parts.append(optax.masked(optax.adaptive_grad_clip(optim.agc), not_head))
    if weight_decay and optim.decay == "coupled" and not row.trust_ratio:
        parts.append(optax.add_decayed_weights(weight_decay, mask=mask))
    if row.scale:
        scale = row.scale(b1, b2, eps)
        parts.append(freezing.apart(scale, late) if late else scale)
    if row.trust_ratio:
        parts.append(optax.masked(row.trust_ratio(weight_decay, eps), mask))

    rate = [optax.scale_by_learning_rate(schedule)]
    if optim.schedule == "plateau":
        rate.append(scale_by_rate_factor())
    momentum = []
    if optim.momentum and row.momentum_form:
        nesterov = optim.nesterov and row.nesterov
        momentum.append(optax.trace(optim.momentum, nesterov=nesterov))
    form = optim.momentum_form or row.momentum_form
    parts += momentum + rate if form == "torch" else rate + momentum

    if weight_decay and optim.decay == "decoupled":
        parts.append(
            optax.add_decayed_weights(
                lambda step: -weight_decay * schedule(step), mask=mask
            )
        )
    if optim.layer_decay != 1:
        parts.append(scale_by_layer(optim.layer_decay))
    if optim.head_learning_rate:
        # A factor of the whole update, which comes after the rate and decoupled decay.
        # The decay of `schedule` is scaled by the rate / its peak, which is the same.
        parts.append(scale_head(optim.head_learning_rate / optim.learning_rate))
    if weight_decay and optim.decay == "schedule":
        per_rate = weight_decay / peak_rate(config)
        parts.append(
            optax.add_decayed_weights(
                lambda step: -per_rate * schedule(step), mask=mask
            )
        )
    return optax.chain(*parts)


def make_decay(config: ConfigDict, schedule: optax.Schedule) -> optax.Schedule | None:
    """Returns the effective per-step decay of a weight whose gradient is zero.

    It is the fraction of the weight that a step removes in the long run. Coupled decay
    passes through momentum, which multiplies it by 1 / (1 - momentum). LARS and LAMB
    also scale it by their trust ratio, which is not included here.

    Args:
      config: The run's configuration.
      schedule: The learning rate as a function of the step.

    Returns:
      The decay as a function of the step; None if there is no weight decay, or if an
      adaptive method rescales it together with the gradients.
    """
    optim, row = config.optim, OPTIMIZERS[config.optim.name]
    factor = optim.weight_decay
    if optim.decay == "schedule":
        factor /= peak_rate(config)
    elif optim.decay == "coupled" and row.scale and not row.trust_ratio:
        return None
    elif optim.decay == "coupled" and row.momentum_form:
        factor /= 1 - optim.momentum
    return (lambda step: factor * schedule(step)) if factor else None


def scale_head(factor: float) -> optax.GradientTransformation:
    """Scales the update of the head.

    Args:
      factor: The head's learning rate / that of the rest.
    """

    def update(updates: Tree, params: Tree):
        del params
        return jax.tree.map(
            lambda x, rest: x if rest else x * factor, updates, not_head(updates)
        )

    return optax.stateless(update)


def scale_by_layer(layer_decay: float) -> optax.GradientTransformation:
    """Scales each layer's update by `layer_decay` ** (number of layers after it).

    Clark et al. 2020 (arXiv:2003.10555), section 3.1; `layer_numbers` says what a layer
    is. optax has no layer-wise rates; its `partition` would split the state by layer.

    Args:
      layer_decay: The ratio of the learning rates of a layer and of the next one.
    """

    def update(updates: Tree, params: Tree):
        del params
        numbers = layer_numbers(updates)
        # The last layer may be frozen, and then it has no leaves.
        last = max(layer_numbers(dict.fromkeys(updates, 0)).values())
        return jax.tree.map(
            lambda x, number: x * layer_decay ** (last - number), updates, numbers
        )

    return optax.stateless(update)


def layer_numbers(params: Tree) -> Tree:
    """Returns a tree of integers: the number of the layer of each parameter.

    The stem is layer 0, each block is one layer, and the head is the last one. A final
    norm or convolution belongs to the last block, as timm groups parameters.

    Args:
      params: Parameters with a tree for each block, as `unstack_blocks` returns them.
    """
    blocks = {block for name in params if (block := _block_of(name))}
    order = {block: number for number, block in enumerate(sorted(blocks), 1)}

    def layer_of(path, _) -> int:
        name = path[0].key
        if name.startswith("stem"):
            return 0
        if name.startswith("final"):
            return len(order)
        block = _block_of(name)
        return order[block] if block else len(order) + 1

    return jax.tree_util.tree_map_with_path(layer_of, params)


def _block_of(name: str) -> tuple[int, int] | None:
    match = re.match(r"stage(\d+)_[a-z]+(\d+)", name)
    return (int(match[1]), int(match[2])) if match else None


def decayed(params: Tree, exclude: str) -> Tree:
    """Returns a tree of booleans: whether weight decay applies to each parameter.

    Args:
      params: Parameters.
      exclude: A key of `DECAY_EXCLUDES`.
    """

    def is_decayed(path, leaf) -> bool:
        *parents, last = (key.key for key in path)
        norm = bool(parents) and "norm" in parents[-1]
        name = f"norm/{last}" if norm else last
        if exclude == "ndim<=1" and leaf.ndim <= 1:
            return False
        return name not in DECAY_EXCLUDES[exclude]

    return jax.tree_util.tree_map_with_path(is_decayed, params)


def not_head(params: Tree) -> Tree:
    """Returns a tree of booleans: false for the parameters of the head."""
    return {
        name: jax.tree.map(lambda _, name=name: name != "head", tree)
        for name, tree in params.items()
    }


def needs_single_blocks(optim: ConfigDict) -> bool:
    """Tells whether an optimiser would update stacked blocks differently.

    It would if an update depends on a parameter's norm, shape or layer, not on each
    value alone.

    Args:
      optim: The section `config.optim`.
    """
    return bool(
        OPTIMIZERS[optim.name].trust_ratio
        or optim.agc
        or optim.layer_decay != 1
        or optim.weight_decay_exclude == "ndim<=1"
    )


def on_single_blocks(
    optimizer: optax.GradientTransformation, spec: Spec
) -> optax.GradientTransformation:
    """Returns the optimiser for parameters in which equal blocks are stacked.

    Args:
      optimizer: An optimiser for parameters with a tree for each block. It sees such
        parameters: they are unstacked before each update.
      spec: The network.
    """

    def unstack(params: Tree) -> Tree:
        return unstack_blocks({"params": params}, spec)["params"]

    def update(updates: Tree, state: Tree, params: Tree = None):
        updates, state = optimizer.update(unstack(updates), state, unstack(params))
        return stack_blocks({"params": updates}, spec)["params"], state

    return optax.GradientTransformation(
        lambda params: optimizer.init(unstack(params)), update
    )


def update_ema(
    ema: Tree,
    new: Tree,
    decay: float,
    step: jax.Array,
    *,
    every: int = 1,
    warmup: str = "tf",
    copy_until: int = 0,
) -> Tree:
    """Updates the EMA of parameters and running statistics.

    `warmup` says how the initial values are forgotten:

    - `tf`: the decay rate is at most (1 + step) / (10 + step), as in TensorFlow's
      ExponentialMovingAverage.
    - `timm`: it is at most 1 - (1 + step) ** (-2 / 3), as in timm's ModelEmaV3.
    - `copy`: the EMA is a copy up to its first update after `copy_until`, as in
      torchvision until the learning rate has warmed up.
    - `none`: the decay rate is the same from the beginning.

    Args:
      ema: The EMA before this step.
      new: The values after this step, a tree of the same structure.
      decay: The decay rate: the weight of the old EMA.
      step: The number of updates before this one.
      every: The EMA is updated at steps that are multiples of this, as in torchvision.
      warmup: One of `EMA_WARMUPS`.
      copy_until: The step that `copy` refers to.
    """
    rate: float | Float[Array, ""] = decay
    if warmup == "tf":
        rate = jnp.minimum(rate, (1.0 + step) / (10.0 + step))
    elif warmup == "timm":
        rate = jnp.minimum(rate, 1 - (1.0 + step) ** (-2 / 3))
    elif warmup == "copy":
        rate = jnp.where(step - every < copy_until, 0.0, rate)
    if every > 1:
        rate = jnp.where(step % every == 0, rate, 1.0)
    # optax.incremental_update weighs by 1 - rate and 1 - (1 - rate), which rounds
    # differently.
    return jax.tree.map(lambda old, x: rate * old + (1 - rate) * x, ema, new)
