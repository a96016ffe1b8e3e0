"""The pure functions that jit compiles: train, statistics and evaluation steps."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from resnet_jax.kernels.platforms import traced_once
from resnet_jax.models.inputs import normalize
from resnet_jax.training import losses, metrics, optim
from resnet_jax.training.freezing import NOTHING, Frozen
from resnet_jax.training.mixup import Mix
from resnet_jax.training.optim import Tree

# Folded into a step's random key to draw the numbers of mixup. Microbatches fold in
# their own numbers, which are smaller.
MIXING = 2**31


@flax.struct.dataclass
class TrainState:
    """Everything that a train step changes, as trees of arrays or of their shapes.

    Attributes:
      step: The number of updates so far, an int32 scalar.
      params: The parameters, float32.
      batch_stats: The running statistics of batch norm, float32; empty for networks
        without batch norm.
      opt_state: The optimiser's state.
      ema: The EMA of `params` and `batch_stats`, a dictionary of the two; or None.
    """

    step: Tree
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    ema: Tree

    def evaluated(self) -> dict[str, Tree]:
        """Returns the variables to evaluate: the EMA if there is one."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A trained network whose outputs the student learns (Hinton et al. 2015).

    Attributes:
      model: The network. It gets the same (mixed) images as the student and runs in
        evaluation mode.
      weight: The weight of distillation in the loss, from 0 to 1; the labels have the
        rest.
      temperature: The temperature of both softmaxes; see `losses.distillation`.
    """

    model: nn.Module
    weight: float = 0.5
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Options of a train step besides the network and the optimiser.

    Attributes:
      mean, std: The mean and standard deviation of each channel, for pixels from 0 to
        1.
      loss: `loss(logits, labels)`, which has a value for each example; see
        `losses.make_loss`.
      class_weights: The weight of each class in the loss of the labels, or None; see
        `losses.cross_entropy`. The distillation loss is not weighted, since its targets
        are the teacher's outputs, whatever the label.
      mix: The options of mixup and CutMix, or None.
      teacher: The network that the student learns from, or None.
      microbatches: The number of equal parts of a batch whose gradients are averaged
        before the update.
      microbatch_unit: The number of consecutive examples that go to one microbatch
        together.
      sam_rho: The radius rho of sharpness-aware minimisation (Foret et al. 2021,
        arXiv:2010.01412, section 2): the update uses the gradient at params + rho *
        gradient / |gradient|. 0 turns it off.
      sam_every: Sharpness-aware minimisation applies to each such step only; all others
        use the plain gradient.
      ema_decay, ema_every, ema_warmup, ema_copy_until: The options of the EMA; see
        `optim.update_ema`. A decay rate of 0 keeps no EMA.
      seed: The seed of random numbers. Dropout depends on (seed, step, microbatch),
        mixup on (seed, step).
      replicate: Constrains the random numbers of mixup to be replicated. Otherwise each
        device would draw its own part of them, and the loops that sample from the beta
        distribution would wait for each other.
      all_gather: All-gathers sharded parameters before they are used; see
        `resnet_jax.parallel.sharding`.
      frozen: The parameters and statistics that the step does not change.
    """

    mean: Sequence[float]
    std: Sequence[float]
    loss: Callable = losses.cross_entropy
    class_weights: Float[np.ndarray, "classes"] | None = None
    mix: Mix | None = None
    teacher: Teacher | None = None
    microbatches: int = 1
    microbatch_unit: int = 1
    sam_rho: float = 0.0
    sam_every: int = 1
    ema_decay: float = 0.0
    ema_every: int = 1
    ema_warmup: str = "tf"
    ema_copy_until: int = 0
    seed: int = 0
    replicate: Callable[[Tree], Tree] = lambda tree: tree
    all_gather: Callable[[Tree], Tree] = lambda params: params
    frozen: Frozen = NOTHING


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    image_size: int,
    ema: bool,
    frozen: Frozen = NOTHING,
) -> TrainState:
    """Returns the randomly initialised state before the first step.

    Args:
      model: The network.
      optimizer: The optimiser.
      seed: The seed of the initial parameters.
      image_size: The height and width of the images in pixels.
      ema: True to keep an EMA.
      frozen: The parameters for which the optimiser has no state.
    """
    image = jnp.zeros((1, image_size, image_size, model.spec.in_channels))
    variables = model.init(jax.random.key(seed), image)
    return state_from(variables, optimizer, ema=ema, frozen=frozen)


def state_from(
    variables: Mapping[str, Tree],
    optimizer: optax.GradientTransformation,
    *,
    ema: bool,
    frozen: Frozen = NOTHING,
) -> TrainState:
    """Returns the state before the first step of a run from given variables.

    Args:
      variables: `params`, and `batch_stats` if the network has batch norm.
      optimizer: The optimiser.
      ema: True to keep an EMA, which starts at the variables.
      frozen: The parameters for which the optimiser has no state.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(frozen.trained(variables["params"])),
        # The train step donates the state, so that no two leaves may share a buffer.
        ema=jax.tree.map(jnp.copy, {"batch_stats": {}, **variables}) if ema else None,
    )


def make_train_step(
    model: nn.Module, optimizer: optax.GradientTransformation, options: StepOptions
) -> Callable[..., tuple[TrainState, dict]]:
    """Returns `train_step(state, batch, teacher=None) -> (state, metrics)`.

    `batch` holds the uint8 `image` [b, h, w, c] and the int32 `label` [b]; `teacher`
    are the variables of the teacher, if there is one. `metrics` are float32 scalars:
    `loss`, the mean over the batch; `top1`, the fraction of correct predictions (of a
    mixed image the class with the highest weight counts); and `grad_norm`, the L2 norm
    of the loss's gradient before clipping and weight decay. Gradients are only those by
    the parameters that are not frozen.

    Args:
      model: The network.
      optimizer: The optimiser.
      options: The step's options.
    """
    frozen = options.frozen

    def loss_of(trained, state, part, rng, teacher):
        params = frozen.merge(trained, state.params)
        label = part["label"]
        if options.mix:
            image = normalize(part["image"], options.mean, options.std, jnp.float32)
            label = losses.one_hot(label, model.spec.num_classes)
            image, label = options.mix.apply(image, label, part["drawn"])
            image = image.astype(model.dtype)
        else:
            image = normalize(part["image"], options.mean, options.std, model.dtype)
        with frozen.applied():
            logits, updated = model.apply(
                {
                    "params": options.all_gather(params),
                    "batch_stats": state.batch_stats,
                },
                image,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": rng},
            )
        if options.class_weights is None:
            loss = options.loss(logits, label).mean()
        else:
            loss = options.loss(logits, label, class_weights=options.class_weights)
            loss = (loss * part.get("factor", 1.0)).mean()
        if options.teacher:
            weight = options.teacher.weight
            targets = options.teacher.model.apply(teacher, image, train=False)
            temperature = options.teacher.temperature
            distilled = losses.distillation(logits, targets, temperature).mean()
            loss = (1 - weight) * loss + weight * distilled
        classes = label if label.ndim == 1 else jnp.argmax(label, axis=-1)
        top1 = jnp.mean(metrics.rank_of_label(logits, classes) == 0)
        return loss, (frozen.trained(updated.get("batch_stats", {})), top1)

    def gradients(trained, state: TrainState, part, number, teacher):
        rng = jax.random.fold_in(jax.random.key(options.seed), state.step)
        rng = jax.random.fold_in(rng, number)
        grad_of = jax.value_and_grad(loss_of, has_aux=True)
        (loss, (stats, top1)), grads = grad_of(trained, state, part, rng, teacher)
        return {"grads": grads, "batch_stats": stats, "loss": loss, "top1": top1}

    def accumulated(trained, state: TrainState, batch, teacher):
        # Every microbatch starts from the same running statistics and holds complete
        # ghost batches, so the means over the microbatches equal those of one large
        # pass. optax.MultiSteps needs several calls for a step, and a larger state.
        count = options.microbatches
        unit = options.microbatch_unit
        # The random numbers of mixup have a row for each ghost batch.
        units = {"image": unit, "label": unit, "factor": unit, "drawn": 1}
        parts = {
            key: jax.tree.map(functools.partial(_cut, parts=count, unit=units[key]), x)
            for key, x in batch.items()
        }

        def add(total, numbered_part):
            part, number = numbered_part
            out = gradients(trained, state, part, number, teacher)
            return jax.tree.map(jnp.add, total, out), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, trained, state, first, 0, teacher)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, (parts, jnp.arange(count)))
        return jax.tree.map(lambda x: x / count, total)

    def draw(mix: Mix, step: jax.Array, image: jax.Array):
        rng = jax.random.fold_in(jax.random.key(options.seed), step)
        rng = jax.random.fold_in(rng, MIXING)
        groups = len(image) // model.bn_group_size
        return options.replicate(mix.draw(rng, groups, *image.shape[1:3]))

    def train_step(
        state: TrainState, batch: dict, teacher: Tree = None
    ) -> tuple[TrainState, dict]:
        if options.mix:
            batch = {**batch, "drawn": draw(options.mix, state.step, batch["image"])}
        elif options.class_weights is not None:
            # Before the batch is cut, since the sum of weights is that of all of it.
            factor = losses.batch_factors(batch["label"], options.class_weights)
            batch = {**batch, "factor": factor}

        def gradients_at(trained):
            if options.microbatches == 1:
                return gradients(trained, state, batch, 0, teacher)
            return accumulated(trained, state, batch, teacher)

        trained = frozen.trained(state.params)
        out = gradients_at(trained)
        grads, grad_norm = out["grads"], _global_norm(out["grads"])
        if options.sam_rho:
            # The loss and the batch statistics are those at the unperturbed parameters.
            # optax.contrib.sam would change the tree of the optimiser's state.
            def sharpness_aware():
                scale = options.sam_rho / (grad_norm + 1e-12)
                perturbed = optax.tree.add_scale(trained, scale, grads)
                return gradients_at(perturbed)["grads"]

            now = (state.step + 1) % options.sam_every == 0
            grads = jax.lax.cond(now, sharpness_aware, lambda: grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        ema = state.ema
        if options.ema_decay:
            # The EMA of a value that stays would round it.
            new = {"params": trained, "batch_stats": out["batch_stats"]}
            new = optim.update_ema(
                {name: frozen.trained(tree) for name, tree in ema.items()},
                new,
                options.ema_decay,
                state.step,
                every=options.ema_every,
                warmup=options.ema_warmup,
                copy_until=options.ema_copy_until,
            )
            ema = {name: frozen.merge(tree, ema[name]) for name, tree in new.items()}
        state = TrainState(
            step=state.step + 1,
            params=frozen.merge(trained, state.params),
            batch_stats=frozen.merge(out["batch_stats"], state.batch_stats),
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
    """Returns the L2 norm of a tree.

    `optax.tree.norm` would trace the sum of squares once for each array; this function
    traces it once for each shape.
    """
    return jnp.sqrt(sum(map(_sum_of_squares, jax.tree.leaves(tree))))


@traced_once
def _sum_of_squares(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sum(jnp.square(x))


def _cut(x: jax.Array, parts: int, unit: int) -> jax.Array:
    """Cuts a batch into parts: [parts, rows, ...].

    Units of `unit` consecutive rows go to the parts in turn, so that each device keeps
    its own rows; consecutive slices would move them between devices.
    """
    units = x.reshape(-1, parts, unit, *x.shape[1:])
    return units.swapaxes(0, 1).reshape(parts, -1, *x.shape[1:])


def make_statistics_step(
    model: nn.Module,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
    all_gather: Callable[[Tree], Tree] = lambda params: params,
    frozen: Frozen = NOTHING,
) -> Callable[[dict, dict], Tree]:
    """Returns `statistics_step(variables, batch) -> batch_stats`.

    The statistics are those of that batch alone.

    Args:
      model: The network.
      mean: The mean of each channel, for pixels from 0 to 1.
      std: The standard deviation of each channel.
      seed: The seed of dropout.
      all_gather: All-gathers sharded parameters; see `StepOptions`.
      frozen: The statistics that stay as they are.
    """
    # With a decay rate of 0 the running statistics are those of the last batch.
    model = model.clone(spec=dataclasses.replace(model.spec, norm_momentum=0.0))

    def statistics_step(variables: dict, batch: dict) -> Tree:
        image = normalize(batch["image"], mean, std, model.dtype)
        with frozen.applied():
            _, updated = model.apply(
                {**variables, "params": all_gather(variables["params"])},
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
    all_gather: Callable[[Tree], Tree] = lambda params: params,
    returns_logits: bool = False,
) -> Callable[[dict, dict, jax.Array], tuple[dict, dict]]:
    """Returns `eval_step(variables, batch, allowed) -> (sums, predictions)`.

    `batch` holds the uint8 `image` [b, h, w, c] or [b, views, h, w, c], the int32
    `label` and the bool `mask`; `allowed`, bool [classes], says which classes may be
    predicted. `sums` are those of `metrics.evaluation_sums`. `predictions` hold, for
    each row, the predicted int32 `label` and its float32 `probability`; or, if logits
    are returned, the float32 `logits` and the `label` and `mask` of the batch.

    Several views of an image, and with `flip` the mirror image of each, are evaluated
    by the mean of their logits, as fb.resnet.torch and torchvision's users do;
    Krizhevsky et al. 2012, section 4.1, average probabilities.

    Args:
      model: The network.
      mean: The mean of each channel, for pixels from 0 to 1.
      std: The standard deviation of each channel.
      flip: True to evaluate mirror images, too.
      all_gather: All-gathers sharded parameters; see `StepOptions`.
      returns_logits: True to return the logits.
    """

    def views_of(image: jax.Array) -> jax.Array:
        views = image[None] if image.ndim == 4 else jnp.moveaxis(image, 1, 0)
        if flip:
            views = jnp.concatenate([views, views[..., ::-1, :]])
        return views

    def eval_step(
        variables: dict, batch: dict, allowed: Bool[Array, "classes"]
    ) -> tuple[dict, dict]:
        variables = {**variables, "params": all_gather(variables["params"])}

        def logits_of(image: jax.Array) -> Any:
            image = normalize(image, mean, std, model.dtype)
            return model.apply(variables, image, train=False)

        views = views_of(batch["image"])
        if len(views) == 1:
            logits = logits_of(views[0])
        else:
            # The views run one after the other, since memory might not hold them all.
            logits = jnp.mean(jax.lax.map(logits_of, views), axis=0)
        logits = jnp.where(allowed, logits, -jnp.inf)
        if returns_logits:
            rows = {"logits": logits.astype(jnp.float32)}
            rows |= {key: batch[key] for key in ("label", "mask")}
            return metrics.evaluation_sums(logits, rows["label"], rows["mask"]), rows
        probabilities = jax.nn.softmax(logits)
        predictions = {
            "label": jnp.argmax(logits, axis=-1),
            "probability": jnp.max(probabilities, axis=-1),
        }
        sums = metrics.evaluation_sums(logits, batch["label"], batch["mask"])
        return sums, predictions

    return eval_step
