"""Reads the weights that a run starts from, and those of its teacher."""

import dataclasses
import logging

import jax
import jax.numpy as jnp

from resnet_jax.errors import UserError
from resnet_jax.models.scan import stack_blocks
from resnet_jax.models.zoo import Spec
from resnet_jax.parallel import sharding
from resnet_jax.training import programs
from resnet_jax.training.experiment import Experiment
from resnet_jax.training.step import TrainState
from resnet_jax.weights.adapt import as_rgb, fit_classes, fit_ends, input_differences
from resnet_jax.weights.card import Card
from resnet_jax.weights.load import read

log = logging.getLogger(__name__)

# A card, and variables with the head and the input channels of their own training.
Weights = tuple[Card, dict]


def initial_weights(experiment: Experiment) -> Weights | None:
    """Reads the weights of `config.init_from`; returns None if it is empty.

    Raises:
      UserError: The weights cannot be read, or are those of another network.
    """
    config = experiment.config
    if not config.init_from:
        return None
    fields = dataclasses.asdict(experiment.model.spec)
    return read(config.init_from, model=config.model.name, **fields)


def first_state(experiment: Experiment, weights: Weights | None) -> TrainState:
    """Returns the state before the first step, on the devices.

    Args:
      experiment: The experiment.
      weights: The result of `initial_weights`; None for random initialisation.
    """
    if not weights:
        return programs.init_state(experiment)
    variables = _fit(
        weights, experiment, experiment.model.spec, experiment.config.init_from
    )
    if experiment.config.model.scan_blocks:
        variables = stack_blocks(variables, experiment.model.spec)
    return programs.state_from(experiment, variables)


def teacher_weights(experiment: Experiment) -> Weights | None:
    """Reads the weights of the teacher from `config.distill.teacher_init`.

    Returns None without a teacher, or if the teacher is randomly initialised.

    Raises:
      UserError: The weights are for other classes or channels than the student's.
    """
    distill, teacher = experiment.config.distill, experiment.teacher
    if not teacher or distill.teacher_init == "drawn":
        return None
    spec = teacher.model.spec
    ends = ("num_classes", "in_channels")
    fields = {k: v for k, v in dataclasses.asdict(spec).items() if k not in ends}
    card, variables = read(distill.teacher_init, model=distill.teacher, **fields)
    read_spec = card.make_spec()
    for field in ends:
        if getattr(read_spec, field) != getattr(spec, field):
            raise UserError(
                f"distill.teacher_init={distill.teacher_init} has {field}="
                f"{getattr(read_spec, field)}, but the student"
                f" (model.name={experiment.config.model.name}) has"
                f" {getattr(spec, field)}; take a teacher of the same data."
            )
    unknown = sorted(set(experiment.classes) - set(card.classes))
    if len(card.classes) == len(experiment.classes) and unknown:
        raise UserError(
            f"distill.teacher_init={distill.teacher_init} was trained for other classes"
            f" ({unknown[0]!r} is not among them); take a teacher of the same data."
        )
    return card, variables


def teacher_variables(experiment: Experiment, weights: Weights | None) -> dict | None:
    """Returns the teacher's variables on the devices, if there is a teacher.

    Args:
      experiment: The experiment.
      weights: The result of `teacher_weights`; None for random initialisation.
    """
    teacher = experiment.teacher
    if not teacher:
        return None
    if weights:
        origin = experiment.config.distill.teacher_init
        variables = _fit(weights, experiment, teacher.model.spec, origin)
    else:
        shape = programs.train_batch_like(experiment)["image"].shape[1:]
        image = jnp.zeros((1, *shape))
        variables = jax.jit(teacher.model.init)(jax.random.key(0), image)
    return jax.device_put(variables, sharding.replicated(experiment.mesh))


def _fit(weights: Weights, experiment: Experiment, target: Spec, origin: str) -> dict:
    """Returns variables of `target` for the classes and the input of the run.

    `origin` is the name of the weights in a message.
    """
    card, variables = as_rgb(*weights)
    seed, spec, classes = experiment.config.seed, card.make_spec(), experiment.classes
    variables = fit_classes(card, variables, classes, seed=seed, weights=origin)
    variables = fit_ends(variables, spec, target, seed=seed, weights=origin)
    if flags := input_differences(card.for_spec(target), experiment.config.data):
        log.warning(
            "%s expects its input prepared as by %s, and this run prepares it"
            " differently. Start another run with these flags if that is not intended.",
            *(origin, " ".join(flags)),
        )
    return variables
