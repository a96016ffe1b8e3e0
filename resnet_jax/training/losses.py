"""The losses that training minimises, for each example of a batch."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from resnet_jax.errors import UserError, check_known

LOSSES = ("cross_entropy", "binary_cross_entropy")

# The class of each example, or the weight of every class in it.
Labels = Int[Array, "b"] | Float[Array, "b classes"]


def check(config: ConfigDict) -> None:
    """Checks the keys of a config that concern the loss and distillation.

    Raises:
      UserError: The loss is unknown, or two keys contradict each other.
    """
    check_known(f"loss={config.loss!r}", config.loss, LOSSES)
    if config.loss != "binary_cross_entropy":
        for key in ("bce_target_threshold", "bce_sum_classes"):
            if config[key]:
                raise UserError(
                    f"loss={config.loss} does not read {key}={config[key]}; set"
                    f" loss=binary_cross_entropy, or leave {key} out."
                )
    teacher, init = config.distill.teacher, config.distill.teacher_init
    if bool(teacher) != bool(init):
        raise UserError(
            f"distill.teacher={teacher!r} and distill.teacher_init={init!r} must be set"
            " together: they are the name of a network and its weights."
        )


def make_loss(config: ConfigDict) -> Callable[..., Float[Array, "b"]]:
    """Returns the config's `loss(logits, labels)`, which has a value for each example.

    Args:
      config: The run's configuration; `check` says which values are legal.
    """
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
    """Computes the softmax cross entropy of each example, in nats and float32.

    Args:
      logits: The network's outputs, of any floating-point type.
      labels: The class of each example, or the weight of every class in it.
      label_smoothing: The weight that is spread evenly over all classes, the true one
        included, as in torch (Szegedy et al. 2015, arXiv:1512.00567, section 7).
    """
    # optax.softmax_cross_entropy_with_integer_labels rounds differently: it subtracts
    # the label's logit from logsumexp. It would sum smoothed labels in another order.
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    if labels.ndim == 2:
        log_p_of_label = jnp.sum(labels * log_p, axis=-1)
    else:
        log_p_of_label = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    if not label_smoothing:
        return -log_p_of_label
    return -(1 - label_smoothing) * log_p_of_label - label_smoothing * log_p.mean(
        axis=-1
    )


def binary_cross_entropy(
    logits: Float[Array, "b classes"],
    labels: Labels,
    label_smoothing: float = 0.0,
    target_threshold: float = 0.0,
    sum_classes: bool = False,
) -> Float[Array, "b"]:
    """Computes the binary cross entropy over the classes of each example.

    Wightman et al. 2021 (arXiv:2110.00476), section 2.1, as timm implements it: in
    nats and float32, the mean over the classes.

    Args:
      logits: The network's outputs, of any floating-point type.
      labels: The class of each example, or the weight of every class in it.
      label_smoothing: The smoothing e: targets are 1 - e + e / classes for the true
        class and e / classes for the others (not 1 - e / 2 and e / 2).
      target_threshold: Targets above it become 1 and all others 0; 0 keeps the targets.
      sum_classes: True to sum over the classes instead of taking their mean, as in
        big_vision and Composer.
    """
    targets = one_hot(labels, logits.shape[-1])
    if label_smoothing:
        targets = optax.smooth_labels(targets, label_smoothing)
    if target_threshold:
        targets = (targets > target_threshold).astype(jnp.float32)
    by_class = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets)
    return by_class.sum(axis=-1) if sum_classes else by_class.mean(axis=-1)


def distillation(
    logits: Float[Array, "b classes"],
    teacher_logits: Float[Array, "b classes"],
    temperature: float = 1.0,
) -> Float[Array, "b"]:
    """Computes T^2 KL(teacher || student) of each example, in nats and float32.

    The distributions are softmaxes at temperature T (Hinton et al. 2015,
    arXiv:1503.02531, section 2); the factor T^2 keeps the size of the gradient.

    Args:
      logits: The student's outputs, of any floating-point type.
      teacher_logits: The teacher's outputs, of any floating-point type.
      temperature: The temperature T.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    log_q = jax.nn.log_softmax(teacher_logits.astype(jnp.float32) / temperature)
    return temperature**2 * optax.losses.kl_divergence_with_log_targets(log_p, log_q)


def one_hot(labels: Labels, classes: int) -> Float[Array, "b classes"]:
    """Returns the weight of every class in each example, in float32.

    Args:
      labels: The class of each example; or the weight of every class in it, which is
        returned as it is.
      classes: The number of classes.
    """
    if labels.ndim == 2:
        return labels.astype(jnp.float32)
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32)
