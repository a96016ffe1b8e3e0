"""The pure functions that jit compiles: one parameter update, one evaluation batch."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from resnet_jax import losses, metrics, optim
from resnet_jax.errors import UserError, nearest_numbers

Tree = Any


@flax.struct.dataclass
class TrainState:
    """All that a step changes: trees of arrays, or of what stands for them.

    Attributes:
      step: number of updates made, int32.
      params: float32 parameters.
      batch_stats: running statistics of batch norm; empty where there is none.
      opt_state: state of the optimiser.
      ema: averaged {params, batch_stats}, or None.
    """

    step: Tree
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    ema: Tree

    def evaluated(self) -> dict[str, Tree]:
        """The variables to evaluate: the averaged ones if there are any."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What a train step does besides the network and the optimiser.

    Attributes:
      mean, std: of each channel, in units of 0 to 1.
      label_smoothing: see `losses.cross_entropy`.
      microbatches: number of parts that a batch is cut into, whose gradients are
        added up before the update.
      ema_decay: of parameters and running statistics; 0: no average is kept.
      seed: what dropout drops is a function of (seed, step, microbatch).
    """

    mean: Sequence[float]
    std: Sequence[float]
    label_smoothing: float = 0.0
    microbatches: int = 1
    ema_decay: float = 0.0
    seed: int = 0


def normalize(
    image: UInt8[Array, "b h w c"],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: DTypeLike,
) -> Float[Array, "b h w c"]:
    """(image / 255 - mean) / std, computed in float32."""
    scale = 1 / (255 * jnp.asarray(std, jnp.float32))
    shift = jnp.asarray(mean, jnp.float32) / jnp.asarray(std, jnp.float32)
    return (image.astype(jnp.float32) * scale - shift).astype(dtype)


def group_size_of(
    chosen: object, *, batch_size: int, microbatches: int, devices: int
) -> int | None:
    """Examples that share batch-norm statistics; None: all of a microbatch.

    Args:
      chosen: a number of examples, `global` (a whole microbatch) or `device` (what
        one device holds of a microbatch).

    Raises:
      UserError: the size does not divide the microbatch; names the nearest that do.
    """
    legal = [m for m in _divisors(batch_size) if (batch_size // m) % devices == 0]
    if microbatches not in legal:
        raise UserError(
            f"optim.microbatches={microbatches} does not cut a batch of {batch_size}"
            f" into equal parts for {devices} devices; the nearest that does:"
            f" {nearest_numbers(microbatches, legal)}."
        )
    microbatch = batch_size // microbatches
    if chosen == "global":
        return None
    if chosen == "device":
        return microbatch // devices
    if not isinstance(chosen, int) or isinstance(chosen, bool):
        raise UserError(
            f"model.bn_group_size={chosen!r} is neither a number of examples nor"
            " 'global' nor 'device'."
        )
    if chosen < 1 or microbatch % chosen:
        of = f"the batch of {batch_size}"
        if microbatches > 1:
            of = f"a microbatch of {microbatch} ({batch_size} / {microbatches})"
        raise UserError(
            f"model.bn_group_size={chosen} does not divide {of}; the nearest that"
            f" does: {nearest_numbers(chosen, _divisors(microbatch))}."
        )
    return chosen


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    image_size: int,
    ema: bool,
) -> TrainState:
    """The state before the first step; a function of the seed."""
    image = jnp.zeros((1, image_size, image_size, model.spec.in_channels))
    variables = model.init(jax.random.key(seed), image)
    return state_from(variables, optimizer, ema=ema)


def state_from(
    variables: Mapping[str, Tree], optimizer: optax.GradientTransformation, *, ema: bool
) -> TrainState:
    """The state before the first step with these `params` and `batch_stats`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
        # A copy: donated buffers must not be shared.
        ema=jax.tree.map(jnp.copy, {"batch_stats": {}} | variables) if ema else None,
    )


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, options: StepOptions
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Returns `train_step(state, batch) -> (state, metrics)`.

    `batch` holds uint8 `image` [b, h, w, c] and int32 `label` [b]. The metrics are
    float32 scalars: `loss` (mean over the batch), `top1` (fraction that is right) and
    `grad_norm` (of the loss, before clipping and decay).
    """

    def loss_of(params, batch_stats, image, label, rng):
        image = normalize(image, options.mean, options.std, model.dtype)
        logits, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
        loss = losses.cross_entropy(logits, label, options.label_smoothing).mean()
        top1 = jnp.mean(metrics.rank_of_label(logits, label) == 0)
        return loss, (updated.get("batch_stats", {}), top1)

    def gradients(state: TrainState, image, label, part):
        rng = jax.random.fold_in(jax.random.key(options.seed), state.step)
        rng = jax.random.fold_in(rng, part)
        grad_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (stats, top1)), grads = grad_of(
            state.params, state.batch_stats, image, label, rng
        )
        return {"grads": grads, "batch_stats": stats, "loss": loss, "top1": top1}

    def accumulated(state: TrainState, image, label):
        # Every part starts from the same running statistics and holds whole groups of
        # the batch, so the means over the parts are what one large pass would give.
        parts = options.microbatches
        image, label = (
            _cut(x, parts, model.bn_group_size or 1) for x in (image, label)
        )

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradients(state, *part)), None

        shapes = jax.eval_shape(gradients, state, image[0], label[0], 0)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, (image, label, jnp.arange(parts)))
        return jax.tree.map(lambda x: x / parts, total)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        if options.microbatches == 1:
            out = gradients(state, batch["image"], batch["label"], 0)
        else:
            out = accumulated(state, batch["image"], batch["label"])
        updates, opt_state = optimizer.update(
            out["grads"], state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if options.ema_decay:
            new = {"params": params, "batch_stats": out["batch_stats"]}
            ema = optim.update_ema(ema, new, options.ema_decay, state.step)
        state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=out["batch_stats"],
            opt_state=opt_state,
            ema=ema,
        )
        grad_norm = optax.tree.norm(out["grads"])
        return state, {
            "loss": out["loss"],
            "top1": out["top1"],
            "grad_norm": grad_norm,
        }

    return train_step


def _cut(x: jax.Array, parts: int, unit: int) -> jax.Array:
    """Deals units of `unit` consecutive rows to `parts` parts in turn: [parts, ...].

    Dealing, not slicing, leaves each device its own rows.
    """
    units = x.reshape(-1, parts, unit, *x.shape[1:])
    return units.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])


def make_eval_step(
    model: nn.Module, mean: Sequence[float], std: Sequence[float], flip: bool = False
) -> Callable[[dict, dict, jax.Array], tuple[dict, dict]]:
    """Returns `eval_step(variables, batch, allowed) -> (sums, predictions)`.

    `allowed`, bool [classes], says which classes can be predicted. `sums` are those of
    `metrics.evaluation_sums`; `predictions` hold the int32 `label` that the network
    gives to each row and its float32 `probability`.

    Several views of an image, uint8 [b, views, h, w, c], and, with `flip`, the mirror
    image of each, are evaluated by the mean of their logits, as fb.resnet.torch and
    torchvision's users do; Krizhevsky et al. 2012, section 4.1, average probabilities.
    """

    def views_of(image: jax.Array) -> jax.Array:
        views = image[None] if image.ndim == 4 else jnp.moveaxis(image, 1, 0)
        if flip:
            views = jnp.concatenate([views, views[..., ::-1, :]])
        return views

    def eval_step(
        variables: dict, batch: dict, allowed: Bool[Array, "classes"]
    ) -> tuple[dict, dict]:
        def logits_of(image: jax.Array) -> jax.Array:
            image = normalize(image, mean, std, model.dtype)
            return model.apply(variables, image, train=False)

        views = views_of(batch["image"])
        if len(views) == 1:
            logits = logits_of(views[0])
        else:
            # One after the other: together they might not fit.
            logits = jnp.mean(jax.lax.map(logits_of, views), axis=0)
        logits = jnp.where(allowed, logits, -jnp.inf)
        probabilities = jax.nn.softmax(logits)
        predictions = {
            "label": jnp.argmax(logits, axis=-1),
            "probability": jnp.max(probabilities, axis=-1),
        }
        sums = metrics.evaluation_sums(logits, batch["label"], batch["mask"])
        return sums, predictions

    return eval_step
