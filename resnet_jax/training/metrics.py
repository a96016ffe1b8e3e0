"""Sums over examples, which the caller adds up and divides once at the very end."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from resnet_jax.training.losses import cross_entropy


def rank_of_label(
    logits: Float[Array, "b classes"], labels: Int[Array, "b"]
) -> Int[Array, "b"]:
    """Returns the number of classes that rank before the label; 0 means correct.

    Equal logits rank by class, the smaller class first, as in argmax. NaN ranks before
    every number, so that a network which outputs NaN is never correct.

    Args:
      logits: The network's outputs.
      labels: The class of each example, from 0 on.
    """
    label_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    classes = jnp.arange(logits.shape[-1])
    tied_before = (logits == label_logit) & (classes < labels[:, None])
    return jnp.sum(~(logits <= label_logit) | tied_before, axis=-1)


def evaluation_sums(
    logits: Float[Array, "b classes"],
    labels: Int[Array, "b *max_labels"],
    mask: Bool[Array, "b"],
) -> dict[str, jax.Array]:
    """Sums losses and correct predictions over the examples that the mask keeps.

    Args:
      logits: The network's outputs.
      labels: The label of each example, or all of its labels, padded with -1. An
        example with several labels is scored by the one that the network ranks first.
      mask: False for the rows that only fill up the last batch.

    Returns:
      Scalars: `loss`, the sum of the cross entropies in nats, float32; `top1` and
      `top5`, the numbers of examples whose label is the first or among the first five;
      `n`, the number of labelled examples; `unlabelled`, the number of examples without
      a label, which are in no other sum.
    """
    labels = labels.reshape(len(labels), -1)
    known = labels >= 0
    columns = [jnp.maximum(column, 0) for column in labels.T]
    rank = jnp.stack([rank_of_label(logits, column) for column in columns], axis=-1)
    loss = jnp.stack([cross_entropy(logits, column) for column in columns], axis=-1)
    rank = jnp.min(rank, axis=-1, where=known, initial=logits.shape[-1])
    loss = jnp.min(loss, axis=-1, where=known, initial=jnp.inf)
    labelled = known.any(axis=-1)
    unlabelled = jnp.sum(mask & ~labelled)
    mask = mask & labelled
    # With fewer than five classes every label is among the first five, unless the
    # logits are NaN: then the rank equals the number of classes.
    five = min(5, logits.shape[-1])
    return {
        "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
        "top1": jnp.sum((rank < 1) & mask),
        "top5": jnp.sum((rank < five) & mask),
        "n": jnp.sum(mask),
        "unlabelled": unlabelled,
    }
