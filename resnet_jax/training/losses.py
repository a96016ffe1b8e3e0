"""What training minimises."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from resnet_jax.errors import UserError, check_known

LOSSES = ("cross_entropy", "binary_cross_entropy")

# A class each, or how much of each class.
Labels = Int[Array, "b"] | Float[Array, "b classes"]


def check(config: ConfigDict) -> None:
    """Raises UserError for a loss that cannot be."""
    check_known(f"loss={config.loss!r}", config.loss, LOSSES)
    for key in ("label_smoothing", "bce_target_threshold"):
        if not 0 <= config[key] <= 1:
            raise UserError(f"{key}={config[key]} must be from 0 to 1.")
    if config.loss != "binary_cross_entropy":
        for key in ("bce_target_threshold", "bce_sum_classes"):
            if config[key]:
                raise UserError(
                    f"loss={config.loss} does not read {key}={config[key]}; set"
                    " loss=binary_cross_entropy or leave the other out."
                )
    if not 0 <= config.distill.weight <= 1:
        raise UserError(
            f"distill.weight={config.distill.weight} must be from 0 to 1: the teacher's"
            " part of the loss."
        )
    if config.distill.temperature <= 0:
        raise UserError(
            f"distill.temperature={config.distill.temperature} must be more than 0."
        )
    teacher, init = config.distill.teacher, config.distill.teacher_init
    if bool(teacher) != bool(init):
        raise UserError(
            f"distill.teacher={teacher!r} and distill.teacher_init={init!r} go"
            " together: a network of the zoo and its weights."
        )


def make_loss(config: ConfigDict) -> Callable[..., Float[Array, "b"]]:
    """The `loss(logits, labels)` of a config, for each example."""
    if config.loss == "cross_entropy":
        return functools.partial(cross_entropy, label_smoothing=config.label_smoothing)
    return functools.partial(
        binary_cross_entropy,
        label_smoothing=config.label_smoothing,
        target_threshold=config.bce_target_threshold,
        sum_classes=config.bce_sum_classes,
    )


def cross_entropy(
    logits: Float[Array, "b classes"],
    labels: Labels,
    label_smoothing: float = 0.0,
) -> Float[Array, "b"]:
    """Softmax cross entropy of each example, in nats and float32.

    Label smoothing (Szegedy et al. 2015, arXiv:1512.00567, section 7) spreads
    `label_smoothing` evenly over all classes, the true one included, as torch does.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    if labels.ndim == 2:
        true = jnp.sum(labels * log_p, axis=-1)
    else:
        true = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    if not label_smoothing:
        return -true
    return -(1 - label_smoothing) * true - label_smoothing * log_p.mean(axis=-1)


def binary_cross_entropy(
    logits: Float[Array, "b classes"],
    labels: Labels,
    label_smoothing: float = 0.0,
    target_threshold: float = 0.0,
    sum_classes: bool = False,
) -> Float[Array, "b"]:
    """Binary cross entropy of each class (Wightman et al. 2021, arXiv:2110.00476).

    As timm has it: in nats, float32, the mean over the classes. With smoothing the
    targets are 1 - e + e / classes and e / classes, not e / 2.

    Args:
      logits: of the network.
      labels: classes, or parts of each class.
      label_smoothing: e above.
      target_threshold: targets above it become 1 and others 0; 0: they stay.
      sum_classes: the sum over the classes instead of the mean, as big_vision's and
        Composer's.
    """
    classes = logits.shape[-1]
    targets = one_hot(labels, classes)
    if label_smoothing:
        targets = targets * (1 - label_smoothing) + label_smoothing / classes
    if target_threshold:
        targets = (targets > target_threshold).astype(jnp.float32)
    logits = logits.astype(jnp.float32)
    each = -targets * jax.nn.log_sigmoid(logits)
    each -= (1 - targets) * jax.nn.log_sigmoid(-logits)
    return each.sum(axis=-1) if sum_classes else each.mean(axis=-1)


def distillation(
    logits: Float[Array, "b classes"],
    teacher: Float[Array, "b classes"],
    temperature: float = 1.0,
) -> Float[Array, "b"]:
    """T^2 KL(teacher || student) of softmaxes at temperature T, in nats.

    Hinton et al. 2015 (arXiv:1503.02531), section 2.
    """
    ours = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    theirs = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature)
    return temperature**2 * jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)


def one_hot(labels: Labels, classes: int) -> Float[Array, "b classes"]:
    """How much of each class, in float32."""
    if labels.ndim == 2:
        return labels.astype(jnp.float32)
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32)
