"""The reference networks in torch, under their names in the zoo."""

import numpy as np
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from resnet_jax.models import ZOO, ResNetSpec
from resnet_jax.weights import SCHEMES
from resnet_jax.weights.naming import to_foreign
from tests.helpers import keyed


def build(name: str, variables: dict | None = None, **options) -> nn.Module:
    """Returns the reference of a network of the zoo.

    Args:
      name: The name of the network.
      variables: Its values; by default they are keyed.
      **options: Arguments of timm's function.
    """
    spec, scheme = ZOO[name].spec, SCHEMES[ZOO[name].scheme]
    network = empty(name, **options)
    load(network, to_foreign(variables or keyed.variables(spec), spec, scheme))
    return network.eval()


def build_shallow(name: str, variables: dict, spec: ResNetSpec) -> nn.Module:
    """Returns the reference with the numbers of blocks of a spec, if timm makes it."""
    sizes = "depths" if ZOO[name].scheme == "timm_nf" else "layers"
    network = empty(name, **{sizes: spec.stage_sizes})
    load(network, to_foreign(variables, spec, SCHEMES[ZOO[name].scheme]))
    return network


def empty(name: str, **options) -> nn.Module:
    """Returns the reference as its library makes it, without values if possible."""
    entry = ZOO[name]
    # The kernels of the blur are buffers that are not part of the `state_dict`.
    blurs = getattr(entry.spec, "anti_alias", None) == "blur"
    with torch.device("cpu" if blurs else "meta"):
        if entry.oracle == "timm":
            return timm.create_model(name, **options)
        if entry.oracle == "torchvision":
            return torchvision.models.get_model(name.removeprefix("torchvision_"))
    if name.endswith("_v1"):
        return with_strides_on_first_1x1(timm.create_model(name.removesuffix("_v1")))
    spec = entry.spec
    if name.startswith("highway"):
        return Highway(spec.widths)
    if name.startswith("tutorial_torch"):
        return torchvision.models.get_model(name.removeprefix("tutorial_torch_"))
    if spec.preact:
        bottleneck = spec.block == "preact_bottleneck"
        return Preact(spec.stage_sizes, spec.widths, bottleneck, spec.shortcut)
    if spec.groups > 1:
        return resnext_for_cifar(spec.groups)
    if spec.for_small_images:
        return Cifar(spec.stage_sizes, spec.shortcut, spec.pad_channels)
    return Plain(spec.stage_sizes)


def load(network: nn.Module, tensors: dict[str, np.ndarray]) -> None:
    """Loads a `state_dict` of NumPy arrays strictly."""
    counters = {
        key: torch.zeros((), dtype=torch.int64)
        for key in network.state_dict()
        if key.endswith("num_batches_tracked")
    }
    values = {
        key: torch.from_numpy(np.ascontiguousarray(value))
        for key, value in tensors.items()
    }
    network.load_state_dict(values | counters, strict=True, assign=True)
    for parameter in network.parameters():
        parameter.requires_grad_()


def arrays(network: nn.Module) -> dict[str, np.ndarray]:
    """Returns the network's `state_dict` as NumPy arrays."""
    return {name: value.numpy() for name, value in network.state_dict().items()}


def nchw(images: np.ndarray) -> torch.Tensor:
    """Returns images [b, h, w, c] as torch's [b, c, h, w]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@torch.no_grad()
def logits(network: nn.Module, images: np.ndarray) -> np.ndarray:
    """Returns the network's logits of images [b, h, w, c] in evaluation mode."""
    return network.eval()(nchw(images)).numpy()


def with_strides_on_first_1x1(network: nn.Module) -> nn.Module:
    """Changes v1.5 to v1: stages 2 to 4 have their stride at the first convolution."""
    for stage in (network.layer2, network.layer3, network.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return network


def resnext_for_cifar(cardinality: int) -> nn.Module:
    """Returns ResNeXt-29 (Xie et al. 2016, section 5.2), of timm's blocks."""
    network = timm.models.ResNet(
        timm.models.resnet.Bottleneck,
        layers=(3, 3, 3),
        channels=(64, 128, 256),
        num_classes=10,
        cardinality=cardinality,
        base_width=64,
    )
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = network.layer4 = nn.Identity()
    return network


class Block(nn.Module):
    """Two 3x3 convolutions with an option-A shortcut or without a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: str, pad: str):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        new = outputs - inputs
        self.stride, self.shortcut = stride, shortcut
        self.pad = (new // 2, new - new // 2) if pad == "both" else (0, new)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.shortcut == "pad":
            # F.pad counts from the last axis: width, height, channels.
            x = x[:, :, :: self.stride, :: self.stride]
            y = y + F.pad(x, (0, 0, 0, 0, *self.pad))
        return F.relu(y)


class Cifar(nn.Module):
    """The networks of He et al. 2015, section 4.2: 16, 32 and 64 channels."""

    def __init__(self, sizes: tuple[int, ...], shortcut: str, pad: str):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        inputs = 16
        for stage, size in enumerate(sizes, 1):
            outputs = 8 * 2**stage
            blocks = []
            for i in range(size):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(Block(inputs, outputs, stride, shortcut, pad))
                inputs = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        # akamaster calls the head "linear", everyone else "fc".
        setattr(self, "linear" if pad == "both" else "fc", nn.Linear(64, 10))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        head = self.linear if hasattr(self, "linear") else self.fc
        return head(x.mean(dim=(2, 3)))


class Plain(nn.Module):
    """The plain networks of He et al. 2015, section 3.3, for ImageNet."""

    def __init__(self, sizes: tuple[int, ...]):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for stage, size in enumerate(sizes, 1):
            outputs = 32 * 2**stage
            blocks = []
            for i in range(size):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(Block(inputs, outputs, stride, "none", "end"))
                inputs = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, 1000)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


class PreactBlock(nn.Module):
    """A block of He et al. 2016, figure 1b; the shortcut starts after the first norm.

    Basic blocks have their stride at the first 3x3, bottlenecks at the first 1x1.
    """

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool, pad):
        super().__init__()
        outputs = 4 * width if bottleneck else width
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        widths = [inputs, *[width] * (len(kernels) - 1), outputs]
        for k, kernel in enumerate(kernels, 1):
            step = stride if k == 1 else 1
            conv = nn.Conv2d(
                widths[k - 1], widths[k], kernel, step, kernel // 2, bias=False
            )
            setattr(self, f"norm{k}", nn.BatchNorm2d(widths[k - 1]))
            setattr(self, f"conv{k}", conv)
        self.layers = len(kernels)
        self.stride, self.new = stride, outputs - inputs
        self.downsample = None
        if self.new and not pad:
            self.downsample = nn.Module()
            self.downsample.conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        first = y = F.relu(self.norm1(x))
        for k in range(1, self.layers + 1):
            if k > 1:
                y = F.relu(getattr(self, f"norm{k}")(y))
            y = getattr(self, f"conv{k}")(y)
        if self.downsample is not None:
            x = self.downsample.conv(first)
        elif self.new:
            x = F.pad(
                first[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new)
            )
        return x + y


class Preact(nn.Module):
    """Pre-activation and wide networks for CIFAR, with timm's names of variables."""

    def __init__(self, sizes, widths, bottleneck: bool, shortcut: str):
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        inputs = 16
        for i, (size, width) in enumerate(zip(sizes, widths, strict=True)):
            stage = nn.Module()
            stage.blocks = nn.Sequential()
            for j in range(size):
                stride = 2 if i and not j else 1
                pad = shortcut == "pad"
                block = PreactBlock(inputs, width, stride, bottleneck, pad)
                stage.blocks.append(block)
                inputs = 4 * width if bottleneck else width
            self.stages.append(stage)
        self.norm = nn.BatchNorm2d(inputs)
        self.head = nn.Module()
        self.head.fc = nn.Conv2d(inputs, 10, 1)

    def forward(self, x):
        x = self.stem.conv(x)
        for stage in self.stages:
            x = stage.blocks(x)
        x = F.relu(self.norm(x)).mean(dim=(2, 3), keepdim=True)
        return self.head.fc(x).flatten(1)


class HighwayLayer(nn.Module):
    """A convolutional layer of Srivastava et al. 2015, equation 3."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        if inputs == outputs:
            self.gate = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x):
        y = F.relu(self.conv(x))
        if not hasattr(self, "gate"):
            return y
        gate = torch.sigmoid(self.gate(x))
        return y * gate + x * (1 - gate)


class Highway(nn.Module):
    """Highway layers in stages, with 2x2 max pooling between them."""

    def __init__(self, widths: tuple[tuple[int, ...], ...]):
        super().__init__()
        self.stages = nn.ModuleList()
        inputs = 3
        for stage_widths in widths:
            stage = nn.Sequential()
            for width in stage_widths:
                stage.append(HighwayLayer(inputs, width))
                inputs = width
            self.stages.append(stage)
        self.head = nn.Linear(inputs, 10)

    def forward(self, x):
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i else x)
        return self.head(x.mean(dim=(2, 3)))
