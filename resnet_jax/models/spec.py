"""A residual network as data: the spec that `ResNet` builds and `zoo` lists."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetSpec:
    """All that distinguishes one residual network from another.

    Attributes:
      block: `basic` (two 3x3) or `bottleneck` (1x1, 3x3, 1x1 with 4 x the width);
        He et al. 2015 (arXiv:1512.03385), figure 5.
      stage_sizes: number of blocks in each stage.
      widths: channels of the 3x3 convolutions in each stage.
      stem: `imagenet` (7x7/2 convolution, 3x3/2 max pooling) or `cifar` (3x3).
      stem_width: output channels of the stem's convolution.
      stride_at: where a bottleneck that shrinks its input has its stride: `3x3`
        (v1.5, torchvision) or `1x1` (v1, He et al.). A basic block always has it on
        its first convolution.
      shortcut: where a block changes its shape: `projection` by 1x1 convolution
        (option B) or `pad` by subsampling and zero channels (option A).
      pad_channels: where option A puts the zero channels: at the `end`
        (fb.resnet.torch) or on `both` sides (akamaster/pytorch_resnet_cifar10).
      norm_epsilon: added to the variance in batch norm.
      norm_momentum: keep-momentum, the fraction of the old running statistic that
        stays (torch's 0.1 is 0.9 here).
      norm_unbiased: whether the running variance is multiplied by n / (n - 1), as
        torch does; Flax and Keras do not.
      zero_init_last: whether each block's last batch-norm scale starts at zero, so
        that the block starts as its shortcut (Goyal et al. 2017, section 5.1).
      head_init_std: standard deviation of the normal distribution that the head's
        kernel starts from; None is torch's uniform(-1, 1) / sqrt(features).
      num_classes: size of the output.
      in_channels: channels of the input.
    """

    block: Literal["basic", "bottleneck"]
    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: Literal["imagenet", "cifar"] = "imagenet"
    stem_width: int = 64
    stride_at: Literal["3x3", "1x1"] = "3x3"
    shortcut: Literal["projection", "pad"] = "projection"
    pad_channels: Literal["end", "both"] = "end"
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.9
    norm_unbiased: bool = True
    zero_init_last: bool = False
    head_init_std: float | None = None
    num_classes: int = 1000
    in_channels: int = 3

    def __post_init__(self):
        if len(self.stage_sizes) != len(self.widths):
            raise ValueError(
                f"stage_sizes {self.stage_sizes} and widths {self.widths} must be of"
                " the same length: one entry a stage"
            )
        for field in dataclasses.fields(self):
            allowed = getattr(field.type, "__args__", ())
            value = getattr(self, field.name)
            if isinstance(value, str) and value not in allowed:
                raise ValueError(
                    f"{field.name}={value!r} is not one of {', '.join(allowed)}"
                )
