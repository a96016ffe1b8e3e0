"""Sums over examples that are divided at the very end."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from resnet_jax.training.losses import cross_entropy


def rank_of_label(
    logits: Float[Array, "b classes"], labels: Int[Array, "b"]
) -> Int[Array, "b"]:
    """How many classes come before the true one; 0 is right.

    Of equal logits the smaller class comes first, as in argmax; a logit that is not a
    number comes before all others, so that a broken network is never right.
    """
    true = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    classes = jnp.arange(logits.shape[-1])
    tied_before = (logits == true) & (classes < labels[:, None])
    return jnp.sum(~(logits <= true) | tied_before, axis=-1)


def evaluation_sums(
    logits: Float[Array, "b classes"],
    labels: Int[Array, "b *most"],
    mask: Bool[Array, "b"],
) -> dict[str, jax.Array]:
    """Sums of `loss`, `top1`, `top5` and `n` over the examples that the mask keeps.

    Where examples have several labels, padded with -1, the one counts that the network
    finds likeliest. Those without any are only counted, as `unlabelled`.
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
    # Of fewer than five classes all are among the first five, but NaN has no place.
    five = min(5, logits.shape[-1])
    return {
        "loss": jnp.sum(jnp.where(mask, loss, 0.0)),
        "top1": jnp.sum((rank < 1) & mask),
        "top5": jnp.sum((rank < five) & mask),
        "n": jnp.sum(mask),
        "unlabelled": unlabelled,
    }
