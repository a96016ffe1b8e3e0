"""The weights that a run starts from, and those that it learns from."""

import dataclasses
import logging

import jax
import jax.numpy as jnp

from resnet_jax.errors import UserError
from resnet_jax.models.scan import stack_blocks
from resnet_jax.models.zoo import Spec
from resnet_jax.parallel import sharding
from resnet_jax.training.experiment import Setup
from resnet_jax.training.step import TrainState
from resnet_jax.weights.adapt import as_rgb, fit_classes, fit_ends, input_differences
from resnet_jax.weights.card import Card
from resnet_jax.weights.load import read

log = logging.getLogger(__name__)

# A card, and the variables with the head and the input that they were trained with.
Weights = tuple[Card, dict]


def initial_weights(setup: Setup) -> Weights | None:
    """Reads the weights of `config.init_from`; returns None if it is empty.

    Raises UserError if they cannot be read, or are those of another network.
    """
    config = setup.config
    if not config.init_from:
        return None
    fields = dataclasses.asdict(setup.model.spec)
    return read(config.init_from, model=config.model.name, **fields)


def first_state(setup: Setup, weights: Weights | None) -> TrainState:
    """Returns the state before the first step.

    Args:
      setup: The run's setup.
      weights: The result of `initial_weights`; None for random initialisation.
    """
    if not weights:
        return setup.init_state()
    variables = _fit(weights, setup, setup.model.spec, setup.config.init_from)
    if setup.config.model.scan_blocks:
        variables = stack_blocks(variables, setup.model.spec)
    return setup.state_from(variables)


def teacher_weights(setup: Setup) -> Weights | None:
    """Reads the weights of `config.distill.teacher_init`; None if there are none.

    Raises UserError if they are for other classes or channels than the student's.
    """
    distill, teacher = setup.config.distill, setup.teacher()
    if not teacher or distill.teacher_init == "drawn":
        return None
    spec = teacher.model.spec
    ends = ("num_classes", "in_channels")
    fields = {k: v for k, v in dataclasses.asdict(spec).items() if k not in ends}
    card, variables = read(distill.teacher_init, model=distill.teacher, **fields)
    theirs = card.make_spec()
    for field in ends:
        if getattr(theirs, field) != getattr(spec, field):
            raise UserError(
                f"distill.teacher_init={distill.teacher_init} has {field}="
                f"{getattr(theirs, field)}, but the student"
                f" (model.name={setup.config.model.name}) has"
                f" {getattr(spec, field)}; take a teacher of the same data."
            )
    unknown = sorted(set(setup.classes) - set(card.classes))
    if len(card.classes) == len(setup.classes) and unknown:
        raise UserError(
            f"distill.teacher_init={distill.teacher_init} was trained for other classes"
            f" ({unknown[0]!r} is not among them); take a teacher of the same data."
        )
    return card, variables


def teacher_variables(setup: Setup, weights: Weights | None) -> dict | None:
    """Returns the teacher's variables on the devices; None if there is no teacher.

    Args:
      setup: The run's setup.
      weights: The result of `teacher_weights`; None for random initialisation.
    """
    teacher = setup.teacher()
    if not teacher:
        return None
    if weights:
        where = setup.config.distill.teacher_init
        variables = _fit(weights, setup, teacher.model.spec, where)
    else:
        image = jnp.zeros((1, *setup.batch_like(1, "image")["image"].shape[1:]))
        variables = jax.jit(teacher.model.init)(jax.random.key(0), image)
    return jax.device_put(variables, sharding.replicated(setup.mesh))


def _fit(weights: Weights, setup: Setup, target: Spec, where: str) -> dict:
    """Returns variables of `target` for the classes and the input of the run."""
    card, variables = as_rgb(*weights)
    seed, spec = setup.config.seed, card.make_spec()
    variables = fit_classes(card, variables, setup.classes, seed=seed, weights=where)
    variables = fit_ends(variables, spec, target, seed=seed, weights=where)
    if flags := input_differences(card.for_spec(target), setup.config.data):
        log.warning(
            "%s expects its input prepared as by %s, and this run prepares it"
            " otherwise; start another run with these flags if that is not intended.",
            *(where, " ".join(flags)),
        )
    return variables
