"""The same networks in stock Linen and in torch, as their own examples train them."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from resnet_jax.models import get_spec

LEARNING_RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-4


class Bottleneck(nn.Module):
    """A bottleneck of `nn.Conv` and `nn.BatchNorm`, as in the Flax ImageNet example."""

    width: int
    stride: int
    conv: Callable
    norm: Callable

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = self.conv(self.width, (3, 3), (self.stride, self.stride))(y)
        y = nn.relu(self.norm()(y))
        y = self.norm()(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.width, (1, 1), (self.stride, self.stride))(x)
            x = self.norm()(x)
        return nn.relu(x + y)


class StockResNet(nn.Module):
    """ResNet-50, -101 or -152 as one writes it with Linen's layers."""

    stage_sizes: Sequence[int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train: bool):
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


def linen_step(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """A train step of `StockResNet`; raises LookupError for other networks."""
    if model not in ("resnet50", "resnet101", "resnet152"):
        raise LookupError(model)
    network = StockResNet(get_spec(model).stage_sizes, jnp.dtype(dtype))
    optimizer = optax.chain(
        optax.add_decayed_weights(DECAY),
        optax.sgd(LEARNING_RATE, MOMENTUM, nesterov=True),
    )
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.standard_normal((batch, size, size, 3), np.float32), dtype)
    label = jnp.asarray(rng.integers(10, size=batch))
    variables = jax.jit(partial(network.init, train=False))(jax.random.key(0), image)
    state = variables["params"], variables["batch_stats"]
    state = (*state, optimizer.init(variables["params"]))

    def loss_of(params, stats):
        logits, new = network.apply(
            {"params": params, "batch_stats": stats},
            image,
            train=True,
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()
        return loss, new["batch_stats"]

    @partial(jax.jit, donate_argnums=0)
    def step(state):
        params, stats, momentum = state
        grads, stats = jax.grad(loss_of, has_aux=True)(params, stats)
        updates, momentum = optimizer.update(grads, momentum, params)
        return optax.apply_updates(params, updates), stats, momentum

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(step(state))

    return run


def torch_network(model: str):
    """torchvision's network, or the CIFAR network of He et al. 2015, section 4.2.

    Raises LookupError if there is neither, ImportError without torch.
    """
    import torchvision
    from torch import nn
    from torch.nn import functional

    if hasattr(torchvision.models, model):
        return getattr(torchvision.models, model)()
    if not model.startswith("cifar_resnet") or not model[12:].isdigit():
        raise LookupError(model)

    class Block(nn.Module):
        def __init__(self, before: int, width: int):
            super().__init__()
            self.stride, self.more = width // before, width - before
            stride = self.stride
            self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

        def forward(self, x):
            y = functional.relu(self.norm1(self.conv1(x)))
            y = self.norm2(self.conv2(y))
            if self.more:
                x = x[:, :, :: self.stride, :: self.stride]
                x = functional.pad(x, (0, 0, 0, 0, 0, self.more))
            return functional.relu(x + y)

    count = (int(model[12:]) - 2) // 6
    stages = [
        Block(width // 2 if i and not j else width, width)
        for i, width in enumerate((16, 32, 64))
        for j in range(count)
    ]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def torch_step(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """An eager train step in `channels_last`, bfloat16 by autocast."""
    import torch

    network = torch_network(model).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(),
        LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        nesterov=True,
    )
    image = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    label = torch.randint(0, 10, (batch,))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def torch_inference(
    model: str, size: int, batch: int, dtype: str, *, compiled: bool
) -> Callable[[], None]:
    """Logits in `channels_last`, eagerly or by `torch.compile`."""
    import torch

    network = torch_network(model).eval().to(memory_format=torch.channels_last)
    if compiled:
        network = torch.compile(network)
    image = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)

    def run() -> None:
        half = dtype == "bfloat16"
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            network(image)

    return run
