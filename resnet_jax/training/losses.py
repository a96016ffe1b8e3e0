"""The losses that training minimises, for each example of a batch."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from resnet_jax.data.derived_sources import labels_of, turns_of
from resnet_jax.data.source_protocol import NamedSource
from resnet_jax.errors import UserError, check_known

LOSSES = ("cross_entropy", "binary_cross_entropy")
# Rules for `data.class_weights`; empty: the classes are not weighted.
CLASS_WEIGHTS = ("", "inverse_frequency", "effective_number")

# The class of each example, or the weight of every class in it.
Labels = Int[Array, "b"] | Float[Array, "b classes"]


def check(config: ConfigDict) -> None:
    """Checks the keys of a config that concern the loss, its weights and distillation.

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
    weights = config.data.class_weights
    check_known(f"data.class_weights={weights!r}", weights, CLASS_WEIGHTS)
    if weights and config.loss != "cross_entropy":
        raise UserError(
            f"loss={config.loss} does not read data.class_weights={weights}, since an"
            " output of its own is trained for each class; set loss=cross_entropy, or"
            " leave data.class_weights out."
        )
    if weights and config.data.balance:
        raise UserError(
            f"data.class_weights={weights} and data.balance=True would correct the"
            " sizes of the classes twice; leave one of them out."
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
    class_weights: Float[np.ndarray, "classes"] | None = None,
) -> Float[Array, "b"]:
    """Computes the softmax cross entropy of each example, in nats and float32.

    Args:
      logits: The network's outputs, of any floating-point type.
      labels: The class of each example, or the weight of every class in it.
      label_smoothing: The weight that is spread evenly over all classes, the true one
        included, as in torch (Szegedy et al. 2015, arXiv:1512.00567, section 7).
      class_weights: The weight of each class, which multiplies the terms of the class
        in the sum over (smoothed) labels, as in torch's `CrossEntropyLoss(weight)`.
        torch then divides the sum over a batch as `batch_factors` says.
    """
    # optax.softmax_cross_entropy_with_integer_labels rounds differently: it subtracts
    # the label's logit from logsumexp. It would sum smoothed labels in another order.
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    if class_weights is not None:
        log_p = jnp.asarray(class_weights) * log_p
    if labels.ndim == 2:
        log_p_of_label = jnp.sum(labels * log_p, axis=-1)
    else:
        log_p_of_label = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    if not label_smoothing:
        return -log_p_of_label
    return -(1 - label_smoothing) * log_p_of_label - label_smoothing * log_p.mean(
        axis=-1
    )


def class_counts(source: NamedSource, classes: int) -> Float[np.ndarray, "classes"]:
    """Returns the number of images of each class in an epoch of a training split.

    The numbers are fractions for sources that are combined by weight, of which an epoch
    has a share. Labels that lie in the records of the images, as in the data sets of
    tfds, are read from all of them.

    Args:
      source: The training split.
      classes: The number of classes.
    """
    sizes, shares, epochs = turns_of(source)
    times = np.repeat(np.divide(shares, sizes) / epochs, sizes)
    return np.bincount(labels_of(source), weights=times, minlength=classes)


def class_weights(
    counts: Float[np.ndarray, "classes"], rule: str, beta: float
) -> Float[np.ndarray, "classes"]:
    """Returns the weight of each class in the loss, in float32.

    - `inverse_frequency`: n / (K n_c) for a class of n_c of the n images, where K
      classes have images. The mean weight of an image is 1, as with "balanced" of
      scikit-learn.
    - `effective_number`: proportional to (1 - beta) / (1 - beta^n_c), whose inverse is
      the effective number of n_c samples (Cui et al. 2019, arXiv:1901.05555, section
      3). The weights sum to K.

    A class without images has the weight 0.

    Args:
      counts: The number of images of each class.
      rule: One of these names.
      beta: The hyperparameter beta of `effective_number`: 0 weights all classes
        equally; the limit 1 is the inverse frequency.

    Examples:
      >>> class_weights(np.array([30.0, 10.0]), "inverse_frequency", beta=0.0)
      array([0.6666667, 2.       ], dtype=float32)
    """
    known = counts > 0
    weights, some = np.zeros(len(counts)), counts[known]
    if rule == "inverse_frequency":
        weights[known] = some.sum() / (len(some) * some)
    else:
        weights[known] = (1 - beta) / (1 - beta**some)
        weights *= len(some) / weights.sum()
    return weights.astype(np.float32)


def batch_factors(
    labels: Int[Array, "b"], class_weights: Float[np.ndarray, "classes"]
) -> Float[Array, "b"]:
    """Returns factors with which the mean of weighted losses is that of torch.

    torch divides the sum of the losses by the sum of the weights of the examples'
    classes, where labels are the numbers of classes. (Where they are weights of all
    classes, it divides by the number of examples.) The factors b / sum are equal for
    all examples of the batch, whose parts then add up to the loss of the whole.

    Args:
      labels: The class of each example of a complete batch.
      class_weights: The weight of each class.
    """
    total = jnp.sum(jnp.asarray(class_weights)[labels])
    return jnp.broadcast_to(len(labels) / total, labels.shape)


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
