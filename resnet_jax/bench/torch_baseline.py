"""The same networks in torch, eager or compiled, in `channels_last`."""

from collections.abc import Callable

import torch
import torchvision
from torch import nn
from torch.nn import functional

LEARNING_RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-4


class Block(nn.Module):
    """A block of two convolutions; what is added grows by zeros."""

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


def network_of(model: str):
    """torchvision's network, or the CIFAR network of He et al. 2015, section 4.2.

    Raises LookupError if there is neither.
    """
    if hasattr(torchvision.models, model):
        return getattr(torchvision.models, model)()
    if not model.startswith("cifar_resnet") or not model[12:].isdigit():
        raise LookupError(f"torch has no {model} here")

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


def step(
    model: str, size: int, batch: int, dtype: str, device: str = "cpu"
) -> Callable[[], None]:
    """An eager train step in `channels_last`, bfloat16 by autocast.

    On a GPU (`device="cuda"`) a call returns before the step has ended.
    """
    network = network_of(model).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(),
        LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        nesterov=True,
    )
    image = torch.randn(batch, 3, size, size)
    image = image.to(device, memory_format=torch.channels_last)
    label = torch.randint(0, 10, (batch,)).to(device)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return run


def inference(model: str, size: int, batch: int, dtype: str) -> Callable[[], None]:
    """Logits, eagerly; bfloat16 by autocast."""
    return _inference(network_of(model).eval(), size, batch, dtype)


def compiled_inference(
    model: str, size: int, batch: int, dtype: str
) -> Callable[[], None]:
    """Logits of `torch.compile`'s program."""
    network = network_of(model).eval().to(memory_format=torch.channels_last)
    return _inference(torch.compile(network), size, batch, dtype)


def _inference(network, size: int, batch: int, dtype: str) -> Callable[[], None]:
    network = network.to(memory_format=torch.channels_last)
    image = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    half = dtype == "bfloat16"

    def run() -> None:
        with (
            torch.inference_mode(),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            network(image)

    return run
