"""Bottleneck ResNets in stock Linen, as the Flax ImageNet example trains them."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

LEARNING_RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-4
STAGE_SIZES = {
    "resnet26": (2, 2, 2, 2),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


class Bottleneck(nn.Module):
    """A bottleneck of `nn.Conv` and `nn.BatchNorm`, as in the Flax ImageNet example.

    Attributes:
      width: Number of channels of the first two convolutions; the last has four times
        as many.
      stride: Stride of the 3x3 convolution and of the projection.
      conv: Makes a convolution from its channels, kernel size and strides.
      norm: Makes a batch norm.
    """

    width: int
    stride: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        """Returns the output of the block."""
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = self.conv(self.width, (3, 3), (self.stride, self.stride))(y)
        y = nn.relu(self.norm()(y))
        y = self.norm()(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.width, (1, 1), (self.stride, self.stride))(x)
            x = self.norm()(x)
        return nn.relu(x + y)


class StockResNet(nn.Module):
    """ResNet-26, -50, -101 or -152 as one writes it with Linen's layers.

    Attributes:
      stage_sizes: Number of bottlenecks of each stage.
      dtype: Type of the computation. Parameters are float32.
    """

    stage_sizes: Sequence[int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"], train: bool
    ) -> Float[Array, "b 1000"]:
        """Returns the logits of a batch of images in float32."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype
        )
        x = nn.relu(norm()(conv(64, (7, 7), (2, 2), padding=[(3, 3), (3, 3)])(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for i, size in enumerate(self.stage_sizes):
            for j in range(size):
                stride = 2 if i and not j else 1
                x = Bottleneck(64 * 2**i, stride, conv, norm)(x)
        x = nn.Dense(1000, dtype=self.dtype)(x.mean(axis=(1, 2)))
        return x.astype(jnp.float32)


def make_network(model: str, dtype: str) -> StockResNet:
    """Makes a `StockResNet`; raises LookupError for networks that it cannot be."""
    if model not in STAGE_SIZES:
        raise LookupError(f"stock Linen has no {model} here")
    return StockResNet(STAGE_SIZES[model], jnp.dtype(dtype))


def make_optimizer() -> optax.GradientTransformation:
    """Returns SGD with Nesterov momentum and weight decay on all parameters."""
    return optax.chain(
        optax.add_decayed_weights(DECAY),
        optax.sgd(LEARNING_RATE, MOMENTUM, nesterov=True),
    )


def train_step(model: str, size: int, batch: int, dtype: str):
    """Makes the train step of a `StockResNet`.

    Args:
      model: Name of the network, a key of `STAGE_SIZES`.
      size: Height and width of the images in pixels.
      batch: Number of images per step.
      dtype: Type of the computation and of the images.

    Returns:
      The jitted step, and the shapes of its two arguments: the state (parameters,
      running statistics and momentum), which is donated, and the batch, a dictionary of
      `image` and `label`.

    Raises:
      LookupError: A `StockResNet` cannot be this network.
    """
    network = make_network(model, dtype)
    optimizer = make_optimizer()
    shapes = {
        "image": jax.ShapeDtypeStruct((batch, size, size, 3), jnp.dtype(dtype)),
        "label": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }

    def init(image):
        variables = network.init(jax.random.key(0), image, train=False)
        params = variables["params"]
        return params, variables["batch_stats"], optimizer.init(params)

    def loss_of(params, stats, batch):
        logits, new = network.apply(
            {"params": params, "batch_stats": stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), new["batch_stats"]

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        params, stats, momentum = state
        grads, stats = jax.grad(loss_of, has_aux=True)(params, stats, batch)
        updates, momentum = optimizer.update(grads, momentum, params)
        return optax.apply_updates(params, updates), stats, momentum

    return step, jax.eval_shape(init, shapes["image"]), shapes


def compiled_step(model: str, size: int, batch: int, dtype: str):
    """Returns the compiled step of `train_step`, a state and a batch of noise."""
    jitted, state_like, shapes = train_step(model, size, batch, dtype)
    compiled = jitted.lower(state_like, shapes).compile()
    rng = np.random.default_rng(0)
    image = rng.standard_normal(shapes["image"].shape, np.float32)
    arrays = {
        "image": jnp.asarray(image, dtype),
        "label": jnp.asarray(rng.integers(10, size=batch), jnp.int32),
    }
    return compiled, make_state(state_like), arrays


def make_state(like):
    """Returns a state of these shapes, of values that do not change the speed."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.01, 0.02, x.shape), x.dtype), like
    )


def step(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """Compiles the step of `train_step`.

    Returns:
      A function that runs one step on noise and waits for its end.
    """
    compiled, state, placed = compiled_step(model, size, batch, dtype)

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(compiled(state, placed))

    return run


def compile_step(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """Checks that the network exists, without compiling its step.

    Returns:
      A function that traces, lowers and compiles the train step once.
    """

    def run() -> None:
        jitted, state_like, shapes = train_step(model, size, batch, dtype)
        jitted.lower(state_like, shapes).compile()

    make_network(model, dtype)
    return run
