"""Batch norm whose groups are counted in examples."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class BatchNorm(nn.Module):
    """Batch norm over groups of `group_size` consecutive examples of the batch.

    Ioffe & Szegedy 2015 (arXiv:1502.03167); groups as in Goyal et al. 2017
    (arXiv:1706.02677), section 2.3, where a group is what one GPU held. A group is
    a number of examples, so the result does not depend on the number of devices; as
    long as no group spans two devices, the statistics need no communication.

    Statistics are float32, the variance is computed in two passes (one pass cancels
    when the mean is large), and the running statistics follow the mean over groups.

    Attributes:
      group_size: examples that share statistics; None: the whole batch. The batch
        must be a multiple of it (ValueError).
      epsilon: added to the variance.
      momentum: keep-momentum of the running statistics.
      unbiased: whether the running variance is multiplied by n / (n - 1).
      scale_init: initialiser of the scale.
      dtype: type of the output.
    """

    group_size: int | None = None
    epsilon: float = 1e-5
    momentum: float = 0.9
    unbiased: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], *, train: bool
    ) -> Float[Array, "b h w c"]:
        b, h, w, c = x.shape
        scale = self.param("scale", self.scale_init, (c,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (c,))
        running_var = self.variable("batch_stats", "var", jnp.ones, (c,))

        if not train:
            mean, var = running_mean.value, running_var.value
            factor = scale / jnp.sqrt(var + self.epsilon)
            return ((x - mean) * factor + bias).astype(self.dtype)

        size = self.group_size or b
        if b % size:
            raise ValueError(f"a batch of {b} cannot be cut into groups of {size}")
        groups = x.reshape(b // size, size, h, w, c).astype(jnp.float32)
        mean = groups.mean(axis=(1, 2, 3), keepdims=True)
        var = jnp.square(groups - mean).mean(axis=(1, 2, 3), keepdims=True)
        factor = scale / jnp.sqrt(var + self.epsilon)
        out = (groups - mean) * factor + bias

        if not self.is_initializing():
            n = size * h * w
            correction = n / max(n - 1, 1) if self.unbiased else 1.0
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * (
                mean.mean(axis=0).reshape(c)
            )
            running_var.value = keep * running_var.value + (1 - keep) * (
                correction * var.mean(axis=0).reshape(c)
            )
        return out.reshape(b, h, w, c).astype(self.dtype)
