"""What training minimises."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "b classes"],
    labels: Int[Array, "b"],
    label_smoothing: float = 0.0,
) -> Float[Array, "b"]:
    """Softmax cross entropy of each example, in nats and float32.

    Label smoothing (Szegedy et al. 2015, arXiv:1512.00567, section 7) spreads
    `label_smoothing` evenly over all classes, the true one included, as torch does.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    true = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    if not label_smoothing:
        return -true
    return -(1 - label_smoothing) * true - label_smoothing * log_p.mean(axis=-1)
