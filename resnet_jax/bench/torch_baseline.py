"""Makes the same train step and inference in torch, eager or compiled."""

from collections.abc import Callable

import torch
import torchvision
from torch import nn
from torch.nn import functional

LEARNING_RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-4


class Block(nn.Module):
    """A block of two 3x3 convolutions; the shortcut is padded with zero channels.

    It downsamples by 2 where it doubles the number of channels.
    """

    def __init__(self, in_width: int, width: int):
        super().__init__()
        self.stride, self.padding = width // in_width, width - in_width
        stride = self.stride
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Applies the block to images `b c h w`."""
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.padding:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, 0, self.padding))
        return functional.relu(x + y)


def make_network(model: str) -> nn.Module:
    """Makes torchvision's network, or a CIFAR network of He et al. 2015, section 4.2.

    Args:
      model: The name of a network of torchvision, or `cifar_resnet` and a depth.

    Raises:
      LookupError: The name is neither.
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
    """Returns a call of the eager train step, in `channels_last`.

    It uses autocast if `dtype` is bfloat16. On a GPU (`device="cuda"`) a call returns
    before the step has ended.
    """
    network = make_network(model).to(device, memory_format=torch.channels_last)
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
    """Returns a call that computes logits eagerly, in bfloat16 by autocast."""
    return _inference(make_network(model).eval(), size, batch, dtype)


def compiled_inference(
    model: str, size: int, batch: int, dtype: str
) -> Callable[[], None]:
    """Returns a call of the program that `torch.compile` makes for the logits."""
    network = make_network(model).eval().to(memory_format=torch.channels_last)
    return _inference(torch.compile(network), size, batch, dtype)


def _inference(
    network: nn.Module, size: int, batch: int, dtype: str
) -> Callable[[], None]:
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
