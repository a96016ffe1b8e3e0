"""The pure functions that jit compiles: one parameter update, one evaluation batch."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from resnet_jax.errors import UserError, nearest_numbers
from resnet_jax.kernels.platforms import traced_once
from resnet_jax.models.inputs import normalize
from resnet_jax.training import losses, metrics, optim
from resnet_jax.training.mixup import Mix

Tree = Any

# What a step's key is folded with to draw for mixing; microbatches have small numbers.
MIXING = 2**31


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
class Teacher:
    """A trained network whose softmax the student learns (Hinton et al. 2015).

    Attributes:
      model: the network; it sees what the student sees, in evaluation mode.
      weight: the teacher's part of the loss.
      temperature: see `losses.distillation`.
    """

    model: nn.Module
    weight: float = 0.5
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What a train step does besides the network and the optimiser.

    Attributes:
      mean, std: of each channel, in units of 0 to 1.
      loss: `loss(logits, labels)` of each example; see `losses.make_loss`.
      mix: how images are mixed, or None.
      teacher: whose softmax the network learns, or None.
      microbatches: number of parts that a batch is cut into, whose gradients are
        added up before the update.
      sam_rho: the update takes the gradient at params + rho * gradient / |gradient|
        (Foret et al. 2021, arXiv:2010.01412, section 2); 0: at params.
      sam_every: only each such step does so, the others as if rho were 0.
      ema_decay, ema_every, ema_warmup, ema_copy_until: see `optim.update_ema`; a decay
        of 0: no average is kept.
      seed: what is dropped is a function of (seed, step, microbatch), what is mixed of
        (seed, step).
      replicate: keeps what is drawn for mixing on every device. Left to themselves,
        the loops that draw from beta would wait for each other.
      whole: makes parameters whole on every device; see `sharding.all_gather_params`.
    """

    mean: Sequence[float]
    std: Sequence[float]
    loss: Callable = losses.cross_entropy
    mix: Mix | None = None
    teacher: Teacher | None = None
    microbatches: int = 1
    sam_rho: float = 0.0
    sam_every: int = 1
    ema_decay: float = 0.0
    ema_every: int = 1
    ema_warmup: str = "tf"
    ema_copy_until: int = 0
    seed: int = 0
    replicate: Callable[[Tree], Tree] = lambda tree: tree
    whole: Callable[[Tree], Tree] = lambda params: params


def group_size_of(
    chosen: object,
    *,
    batch_size: int,
    microbatches: int,
    devices: int,
    tpu_slices: int = 1,
) -> int | None:
    """Returns the ghost batch size in examples, or None for the whole microbatch.

    Args:
      chosen: A number of examples, `global` (a whole microbatch) or `device` (what
        one device holds of a microbatch).
      batch_size: Images per step over all devices.
      microbatches: Number of microbatches of a step.
      devices: Number of devices.
      tpu_slices: Number of TPU slices that the devices form. libtpu (0.0.52) can abort
        where statistics are summed over parts of slices.

    Raises:
      UserError: The size does not divide the microbatch, or ghost batches would spread
        over parts of TPU slices; the message names the nearest legal sizes.
    """
    legal = [m for m in _divisors(batch_size) if (batch_size // m) % devices == 0]
    if microbatches not in legal:
        raise UserError(
            f"optim.microbatches={microbatches} does not cut a batch of {batch_size}"
            f" into equal parts for {devices} devices; use fewer devices, or start a"
            f" run with {nearest_numbers(microbatches, legal)}."
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

    def ends_with_slices(size: int) -> bool:
        # XLA shards the ghost batches over as many devices as divide their number and
        # sums each one's statistics over the devices that are left.
        over = devices // math.gcd(devices, microbatch // size)
        inside = devices // tpu_slices
        return max(over, inside) % min(over, inside) == 0

    if not ends_with_slices(chosen):
        whole = [size for size in _divisors(microbatch) if ends_with_slices(size)]
        raise UserError(
            f"model.bn_group_size={chosen} would spread ghost batches over parts of the"
            f" {tpu_slices} TPU slices of {devices // tpu_slices} devices each, which"
            " libtpu can fail to compile; the nearest size that does not:"
            f" {nearest_numbers(chosen, whole)}."
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
) -> Callable[..., tuple[TrainState, dict]]:
    """Returns `train_step(state, batch, teacher=None) -> (state, metrics)`.

    `batch` holds uint8 `image` [b, h, w, c] and int32 `label` [b]; `teacher` are the
    variables of the teacher, if there is one. The metrics are float32 scalars: `loss`
    (mean over the batch), `top1` (fraction that is right; of a mixed image, the class
    that it has most of) and `grad_norm` (of the loss, before clipping and decay).
    """

    def loss_of(params, batch_stats, part, rng, teacher):
        label = part["label"]
        if options.mix:
            image = normalize(part["image"], options.mean, options.std, jnp.float32)
            label = losses.one_hot(label, model.spec.num_classes)
            image, label = options.mix.apply(image, label, part["drawn"])
            image = image.astype(model.dtype)
        else:
            image = normalize(part["image"], options.mean, options.std, model.dtype)
        logits, updated = model.apply(
            {"params": options.whole(params), "batch_stats": batch_stats},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": rng},
        )
        loss = options.loss(logits, label).mean()
        if options.teacher:
            weight = options.teacher.weight
            theirs = options.teacher.model.apply(teacher, image, train=False)
            temperature = options.teacher.temperature
            distilled = losses.distillation(logits, theirs, temperature).mean()
            loss = (1 - weight) * loss + weight * distilled
        classes = label if label.ndim == 1 else jnp.argmax(label, axis=-1)
        top1 = jnp.mean(metrics.rank_of_label(logits, classes) == 0)
        return loss, (updated.get("batch_stats", {}), top1)

    def gradients(params, state: TrainState, part, number, teacher):
        rng = jax.random.fold_in(jax.random.key(options.seed), state.step)
        rng = jax.random.fold_in(rng, number)
        grad_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (stats, top1)), grads = grad_of(
            params, state.batch_stats, part, rng, teacher
        )
        return {"grads": grads, "batch_stats": stats, "loss": loss, "top1": top1}

    def accumulated(params, state: TrainState, batch, teacher):
        # Every part starts from the same running statistics and holds whole groups of
        # the batch, so the means over the parts are what one large pass would give.
        count = options.microbatches
        unit = model.bn_group_size or 1
        # What was drawn has a row for each group.
        units = {"image": unit, "label": unit, "drawn": 1}
        parts = {
            key: jax.tree.map(functools.partial(_cut, parts=count, unit=units[key]), x)
            for key, x in batch.items()
        }

        def add(total, part):
            found = gradients(params, state, *part, teacher)
            return jax.tree.map(jnp.add, total, found), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, params, state, first, 0, teacher)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, (parts, jnp.arange(count)))
        return jax.tree.map(lambda x: x / count, total)

    def draw(step: jax.Array, image: jax.Array):
        rng = jax.random.fold_in(jax.random.key(options.seed), step)
        size = model.bn_group_size or len(image) // options.microbatches
        rng = jax.random.fold_in(rng, MIXING)
        groups = len(image) // size
        return options.replicate(options.mix.draw(rng, groups, *image.shape[1:3]))

    def train_step(
        state: TrainState, batch: dict, teacher: Tree = None
    ) -> tuple[TrainState, dict]:
        if options.mix:
            batch = {**batch, "drawn": draw(state.step, batch["image"])}

        def at(params):
            if options.microbatches == 1:
                return gradients(params, state, batch, 0, teacher)
            return accumulated(params, state, batch, teacher)

        out = at(state.params)
        grads, grad_norm = out["grads"], _global_norm(out["grads"])
        if options.sam_rho:

            def sharp():
                # Loss and statistics stay those of the parameters that there are.
                scale = options.sam_rho / (grad_norm + 1e-12)
                climbed = optax.tree.add_scale(state.params, scale, grads)
                return at(climbed)["grads"]

            now = (state.step + 1) % options.sam_every == 0
            grads = jax.lax.cond(now, sharp, lambda: grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if options.ema_decay:
            new = {"params": params, "batch_stats": out["batch_stats"]}
            ema = optim.update_ema(
                ema,
                new,
                options.ema_decay,
                state.step,
                every=options.ema_every,
                warmup=options.ema_warmup,
                copy_until=options.ema_copy_until,
            )
        state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=out["batch_stats"],
            opt_state=opt_state,
            ema=ema,
        )
        return state, {
            "loss": out["loss"],
            "top1": out["top1"],
            "grad_norm": grad_norm,
        }

    return train_step


def _global_norm(tree: Tree) -> Float[Array, ""]:
    """`optax.tree.norm`, which traces each array, where this does each shape."""
    return jnp.sqrt(sum(map(_sum_of_squares, jax.tree.leaves(tree))))


@traced_once
def _sum_of_squares(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sum(jnp.square(x))


def _cut(x: jax.Array, parts: int, unit: int) -> jax.Array:
    """Deals units of `unit` consecutive rows to `parts` parts in turn: [parts, ...].

    Dealing, not slicing, leaves each device its own rows.
    """
    units = x.reshape(-1, parts, unit, *x.shape[1:])
    return units.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])


def make_statistics_step(
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    whole: Callable[[Tree], Tree] = lambda params: params,
) -> Callable[[dict, dict], Tree]:
    """Returns `statistics_step(variables, batch) -> batch_stats` of a batch alone.

    `whole` is as in `StepOptions`.
    """
    # Without keep-momentum, the running statistics are those of the last batch.
    model = model.clone(spec=dataclasses.replace(model.spec, norm_momentum=0.0))

    def statistics_step(variables: dict, batch: dict) -> Tree:
        image = normalize(batch["image"], mean, std, model.dtype)
        _, updated = model.apply(
            {**variables, "params": whole(variables["params"])},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(seed)},
        )
        return updated["batch_stats"]

    return statistics_step


def make_eval_step(
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    flip: bool = False,
    whole: Callable[[Tree], Tree] = lambda params: params,
) -> Callable[[dict, dict, jax.Array], tuple[dict, dict]]:
    """Returns `eval_step(variables, batch, allowed) -> (sums, predictions)`.

    `allowed`, bool [classes], says which classes can be predicted. `sums` are those of
    `metrics.evaluation_sums`; `predictions` hold the int32 `label` that the network
    gives to each row and its float32 `probability`. `whole` is as in `StepOptions`.

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
        variables = {**variables, "params": whole(variables["params"])}

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
