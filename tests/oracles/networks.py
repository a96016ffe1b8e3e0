"""The reference networks, built by torch libraries under the names of our zoo."""

import re

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from tests import keyed


def build(name: str) -> nn.Module:
    """Returns the reference for a network of the zoo, with keyed values."""
    depth = int(re.search(r"resnet(\d+)", name)[1])
    if name.startswith("cifar_"):
        network = CifarResNet(depth, pad="end")
    elif depth == 200:  # torchvision has none
        network = timm.create_model("resnet200")
    else:
        network = torchvision.models.get_model(f"resnet{depth}")
    if name.endswith("_v1"):
        move_strides_to_first_1x1(network)
    return fill(network)


def move_strides_to_first_1x1(network: nn.Module) -> None:
    """Turns v1.5 into v1: stages 2 to 4 stride on their first convolution."""
    for stage in (network.layer2, network.layer3, network.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)


def fill(network: nn.Module) -> nn.Module:
    """Gives all parameters and running statistics their keyed values."""
    network.load_state_dict(
        {
            name: torch.from_numpy(value)
            for name, value in keyed.state_dict(shapes(network)).items()
        },
        # num_batches_tracked keeps its value; all other names are the network's own.
        strict=False,
    )
    return network.eval()


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's parameters and running statistics."""
    return {
        name: tuple(value.shape)
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def arrays(network: nn.Module) -> dict[str, np.ndarray]:
    """The network's `state_dict` as numpy arrays."""
    return {name: value.numpy() for name, value in network.state_dict().items()}


def nchw(images: np.ndarray) -> torch.Tensor:
    """Our images as torch takes them."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@torch.no_grad()
def logits(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """The network's logits in evaluation mode."""
    return network.eval()(nchw(images)).numpy()


class CifarBlock(nn.Module):
    """Two 3x3 convolutions beside an option-A shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, pad: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        new = outputs - inputs
        self.stride = stride
        self.pad = (new // 2, new - new // 2) if pad == "both" else (0, new)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        # F.pad counts from the last axis: width, height, channels.
        x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *self.pad))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """He et al. 2015, section 4.2: 6 n + 2 layers, 16, 32 and 64 channels."""

    def __init__(self, depth: int, pad: str, num_classes: int = 10):
        super().__init__()
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (inputs, outputs) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [CifarBlock(inputs, outputs, 1 if stage == 1 else 2, pad)]
            blocks += [CifarBlock(outputs, outputs, 1, pad) for _ in range(n - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))
