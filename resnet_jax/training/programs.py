"""Lowers and compiles the programs that an experiment's devices run.

The programs are the train step, the evaluation steps, the statistics step of precise
batch norm, and the initialisation of the train state. The functions `..._like` return
shapes, types and shardings (`jax.ShapeDtypeStruct`) in place of arrays.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from resnet_jax.compiler import compile_step
from resnet_jax.data.loader import Examples
from resnet_jax.kernels import platforms
from resnet_jax.models.cost import init_shapes
from resnet_jax.parallel import process_memory, sharding
from resnet_jax.training import freezing, losses, step
from resnet_jax.training.experiment import Experiment
from resnet_jax.training.mixup import Mix
from resnet_jax.training.schedules import warmup_steps
from resnet_jax.training.step import TrainState, Tree


@contextlib.contextmanager
def _tracing(experiment: Experiment) -> Iterator[None]:
    """Makes tracing fast, and lets it choose kernels for the experiment's devices."""
    with (
        process_memory.gc_paused(),
        platforms.target_platform(sharding.platform_of(experiment.mesh)),
        platforms.fused_over(experiment.fused_mesh),
    ):
        yield


# Shapes and shardings.


def state_like(experiment: Experiment, number: int = 0) -> TrainState:
    """Returns shapes, types and shardings of the train state.

    Args:
      experiment: The experiment.
      number: The number of the update, from 0 on, that takes and returns the state. The
        state after n steps is that of update n - 1, even if something thaws at step n.
    """
    mesh = experiment.mesh
    with _tracing(experiment):
        state = jax.eval_shape(experiment.init)
        if experiment.frozen(number) != experiment.freeze:
            opt_state = jax.eval_shape(experiment.optimizer.init, state.params)
            state = dataclasses.replace(state, opt_state=opt_state)
    sharding_of = functools.partial(
        sharding.PARAMS[experiment.config.sharding.params], mesh
    )
    ema = state.ema
    if ema:
        ema = {
            "params": _with_sharding(ema["params"], sharding_of),
            "batch_stats": _replicated(ema["batch_stats"], mesh),
        }
    return TrainState(
        step=_replicated(state.step, mesh),
        params=_with_sharding(state.params, sharding_of),
        batch_stats=_replicated(state.batch_stats, mesh),
        opt_state=_with_sharding(state.opt_state, sharding_of),
        ema=ema,
    )


def state_shardings(experiment: Experiment, number: int = 0) -> TrainState:
    """Returns the sharding of each array of the train state; see `state_like`."""
    return jax.tree.map(lambda x: x.sharding, state_like(experiment, number))


def train_batch_like(experiment: Experiment, image_size: int | None = None) -> dict:
    """Returns shapes, types and shardings of `image` and `label` of a training batch.

    Args:
      experiment: The experiment.
      image_size: The side of the images in pixels; by default `data.image_size`.
    """
    examples = experiment.train
    if image_size:
        examples = examples.with_size(image_size)
    batch = _batch_like(experiment.mesh, experiment.config.batch_size, examples)
    return {key: batch[key] for key in ("image", "label")}


def eval_batch_like(experiment: Experiment, examples: Examples | None = None) -> dict:
    """Returns shapes, types and shardings of an evaluation batch.

    The batch has `image`, `label` and `mask`.

    Args:
      experiment: The experiment.
      examples: The examples that are evaluated; by default those of the eval split.
    """
    examples = examples or experiment.eval
    return _batch_like(experiment.mesh, experiment.eval_batch_size, examples)


def _batch_like(mesh: Mesh, batch_size: int, examples: Examples) -> dict:
    batch_sharding = sharding.batch_sharding(mesh)
    image_shape = (*examples.augment.shape, examples.channels)

    def like(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        shape = (batch_size, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)

    return {
        "image": like(image_shape, jnp.uint8),
        "label": like(examples.label_shape, jnp.int32),
        "mask": like((), jnp.bool_),
    }


def teacher_like(experiment: Experiment) -> dict | None:
    """Returns shapes, types and shardings of the teacher's variables, if it has one."""
    if not experiment.teacher:
        return None
    image_size = experiment.config.data.image_size
    shapes = init_shapes(experiment.teacher.model, image_size)
    return _replicated(shapes, experiment.mesh)


def _replicated(shapes: Tree, mesh: Mesh) -> Tree:
    return _with_sharding(shapes, lambda shape: sharding.replicated(mesh))


def _with_sharding(shapes: Tree, sharding_of: Callable[..., NamedSharding]) -> Tree:
    """Returns shapes with the sharding that `sharding_of(shape)` gives each."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x.shape)),
        shapes,
    )


def all_gather(experiment: Experiment, params: Tree) -> Tree:
    """All-gathers sharded parameters before they are used, inside traced functions.

    Args:
      experiment: The experiment.
      params: The parameters, sharded as `config.sharding.params` says.

    Returns:
      The parameters, each replicated.
    """
    return sharding.all_gather_params(
        params, experiment.mesh, experiment.config.sharding.params
    )


# The state before the first step.


def init_state(experiment: Experiment) -> TrainState:
    """Returns the randomly initialised state before the first step, on the devices.

    It compiles and runs `step.init_state` with the experiment's shardings.
    """
    mesh = experiment.mesh
    with _tracing(experiment):
        shardings = state_shardings(experiment)
        init = jax.jit(experiment.init, out_shardings=shardings).lower()
        # Optimising a program that runs once took most of the start on CPUs.
        on_cpu = sharding.platform_of(mesh) == "cpu"
        options: dict[str, Any] = {"xla_backend_optimization_level": 0}
        return init.compile(compiler_options=options if on_cpu else None)()


def state_from(experiment: Experiment, variables: dict) -> TrainState:
    """Returns the state before the first step with given variables, on the devices.

    It runs `step.state_from` with the experiment's shardings.

    Args:
      experiment: The experiment.
      variables: `params` and `batch_stats`, as arrays of the host.
    """
    ema, like = bool(experiment.config.ema_decay), vars(state_like(experiment))
    # Each device gets its part only, since there may be no room for more.
    arrays = sharding.place(variables, {key: like[key] for key in variables})
    return jax.jit(
        lambda variables: step.state_from(
            variables, experiment.optimizer, ema=ema, frozen=experiment.freeze
        ),
        out_shardings=state_shardings(experiment),
    )(arrays)


def thaw(experiment: Experiment, state: TrainState) -> TrainState:
    """Returns the state with which the first update after a thaw begins.

    The optimiser's state of what thaws is that of a new run; the rest stays.

    Args:
      experiment: The experiment.
      state: The state after `experiment.freeze_until` steps, on the devices.
    """
    shardings = state_shardings(experiment, experiment.freeze_until or 0).opt_state
    fresh = jax.jit(experiment.optimizer.init, out_shardings=shardings)(state.params)
    opt_state = freezing.thaw_state(state.opt_state, fresh)
    return dataclasses.replace(state, opt_state=opt_state)


# The steps.


def compile_lowered(
    experiment: Experiment, lowered: jax.stages.Lowered
) -> jax.stages.Compiled:
    """Compiles a step with the options of `config.compiler_options`.

    Args:
      experiment: The experiment.
      lowered: The result of one of the functions `lower_...`.

    Raises:
      UserError: XLA rejects the options.
    """
    kind = experiment.mesh.devices.flat[0].device_kind
    return compile_step(lowered, kind, experiment.config.compiler_options)


def jit_train_step(
    experiment: Experiment, *, distills: bool, number: int = 0
) -> jax.stages.Wrapped:
    """Returns the jitted `train_step(state, batch)`; the state is donated.

    Args:
      experiment: The experiment.
      distills: Selects `train_step(state, batch, teacher=variables)`, which learns from
        the experiment's teacher.
      number: The number of the update, on which it depends what is frozen.
    """
    config, mesh = experiment.config, experiment.mesh
    replicated = sharding.replicated(mesh)
    # The consecutive examples of a ghost batch stay together. If every microbatch is
    # one ghost batch, its examples may be any, and dealing out single examples leaves
    # each device its own rows.
    is_microbatch = config.model.bn_group_size == "global"
    options = step.StepOptions(
        mean=config.data.mean,
        std=config.data.std,
        loss=losses.make_loss(config),
        class_weights=experiment.class_weights,
        mix=Mix.from_config(config.mix),
        teacher=experiment.teacher if distills else None,
        microbatches=config.optim.microbatches,
        microbatch_unit=1 if is_microbatch else experiment.model.bn_group_size,
        sam_rho=config.optim.sam_rho,
        sam_every=config.optim.sam_every,
        ema_decay=config.ema_decay,
        ema_every=config.ema_every,
        ema_warmup=config.ema_warmup,
        ema_copy_until=warmup_steps(
            config,
            total_steps=experiment.total_steps,
            train_size=len(experiment.train.source),
        ),
        seed=config.seed,
        replicate=lambda tree: jax.lax.with_sharding_constraint(tree, replicated),
        all_gather=functools.partial(all_gather, experiment),
        frozen=experiment.frozen(number),
    )
    train_step = step.make_train_step(experiment.model, experiment.optimizer, options)
    out_shardings = state_shardings(experiment, number), replicated
    return jax.jit(train_step, donate_argnums=0, out_shardings=out_shardings)


def lower_train_step(
    experiment: Experiment,
    teacher: dict | None = None,
    image_size: int | None = None,
    number: int = 0,
) -> jax.stages.Lowered:
    """Lowers `train_step(state, batch)`, or `train_step(state, batch, teacher=...)`.

    Args:
      experiment: The experiment.
      teacher: The teacher's variables, or `teacher_like`; None leaves it out.
      image_size: The side of the images in pixels; by default `data.image_size`.
      number: The number of the update, on which it depends what is frozen.
    """
    # The teacher is an argument, since constants would be compiled into the program.
    teacher_argument = {"teacher": teacher} if teacher else {}
    with _tracing(experiment):
        train_step = jit_train_step(experiment, distills=bool(teacher), number=number)
        batch = train_batch_like(experiment, image_size)
        state = state_like(experiment, number)
        return train_step.lower(state, batch, **teacher_argument)


def compile_train_step(
    experiment: Experiment,
    teacher: dict | None = None,
    image_size: int | None = None,
    number: int = 0,
) -> Callable:
    """Compiles `train_step(state, batch)`; the state is donated.

    Args:
      experiment: The experiment.
      teacher: The teacher's variables, on the devices; None leaves it out.
      image_size: The side of the images in pixels; by default `data.image_size`.
      number: The number of the update, on which it depends what is frozen.
    """
    lowered = lower_train_step(experiment, teacher, image_size, number)
    compiled = compile_lowered(experiment, lowered)
    return functools.partial(compiled, teacher=teacher) if teacher else compiled


def compile_statistics_step(experiment: Experiment, number: int = 0) -> Callable:
    """Compiles `statistics_step(variables, batch)` of precise batch norm.

    See `step.make_statistics_step`.

    Args:
      experiment: The experiment.
      number: The number of the last update, on which it depends what is frozen.
    """
    config, data = experiment.config, experiment.config.data
    statistics_step = step.make_statistics_step(
        experiment.model_of_whole_batch(),
        data.mean,
        data.std,
        config.seed,
        functools.partial(all_gather, experiment),
        experiment.frozen(number),
    )
    replicated = sharding.replicated(experiment.mesh)
    with _tracing(experiment):
        like = state_like(experiment)
        variables = {"params": like.params, "batch_stats": like.batch_stats}
        lowered = jax.jit(statistics_step, out_shardings=replicated).lower(
            variables, train_batch_like(experiment)
        )
        return compile_lowered(experiment, lowered)


def lower_eval_step(
    experiment: Experiment,
    examples: Examples | None = None,
    *,
    returns_logits: bool = False,
) -> jax.stages.Lowered:
    """Lowers `eval_step(variables, batch, allowed)`.

    Args:
      experiment: The experiment.
      examples: The examples that are evaluated; by default those of the eval split.
      returns_logits: True to return the logits of the whole batch to every process.
    """
    data = experiment.config.data
    eval_step = step.make_eval_step(
        experiment.model,
        data.mean,
        data.std,
        experiment.config.evaluate.views != "one",
        functools.partial(all_gather, experiment),
        returns_logits,
    )
    replicated = sharding.replicated(experiment.mesh)
    by_row = sharding.batch_sharding(experiment.mesh)
    out_shardings = replicated, replicated if returns_logits else by_row
    allowed = jax.ShapeDtypeStruct(
        (experiment.model.spec.num_classes,), jnp.bool_, sharding=replicated
    )
    with _tracing(experiment):
        return jax.jit(eval_step, out_shardings=out_shardings).lower(
            state_like(experiment).evaluated(),
            eval_batch_like(experiment, examples),
            allowed,
        )


def compile_eval_step(
    experiment: Experiment, examples: Examples | None = None
) -> jax.stages.Compiled:
    """Compiles `eval_step(variables, batch, allowed)`; see `lower_eval_step`."""
    return compile_lowered(experiment, lower_eval_step(experiment, examples))


def compile_eval_steps(
    experiment: Experiment, *, returns_logits: bool = False
) -> dict[tuple[int, ...], Callable]:
    """Compiles one evaluation step per label shape.

    Args:
      experiment: The experiment.
      returns_logits: True to return the logits; see `step.make_eval_step`.

    Returns:
      `eval_step(variables, batch, allowed)` by `Examples.label_shape`, for the eval
      split and the extra evaluation sets.
    """
    by_shape = {experiment.eval.label_shape: experiment.eval}
    for evaluation_set in experiment.sets.values():
        for examples in evaluation_set.parts.values():
            by_shape.setdefault(examples.label_shape, examples)
    return {
        shape: compile_lowered(
            experiment,
            lower_eval_step(experiment, examples, returns_logits=returns_logits),
        )
        for shape, examples in by_shape.items()
    }
