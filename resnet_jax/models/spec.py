"""A residual network as data: the spec that `ResNet` builds and `zoo` lists."""

import dataclasses
import math
import types
import typing
from typing import Literal

from resnet_jax.errors import BadValueError

BlockName = Literal[
    "basic", "bottleneck", "preact_basic", "preact_bottleneck", "norm_free"
]

# Values that only some kinds of block know; others would pass over them in silence.
KNOWN_BY = {
    ("attention", "se"): ("basic", "bottleneck", "norm_free"),
    ("attention", "eca"): ("basic", "bottleneck", "norm_free"),
    ("anti_alias", "avg"): ("basic", "bottleneck"),
    ("anti_alias", "blur"): ("basic", "bottleneck"),
    ("spatial", "selective_kernel"): ("basic", "bottleneck"),
    ("spatial", "split_attention"): ("bottleneck",),
    ("spatial", "hierarchical"): ("bottleneck",),
    ("extra_conv", True): ("norm_free",),
    ("skip_gain", True): ("norm_free",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResNetSpec:
    """All that distinguishes one residual network from another.

    Blocks and widths:
      block: `basic` (two 3x3) or `bottleneck` (1x1, 3x3, 1x1), He et al. 2015
        (arXiv:1512.03385), figure 5; `preact_basic` and `preact_bottleneck`, the same
        with norm and activation before each convolution, He et al. 2016
        (arXiv:1603.05027); `norm_free`, Brock et al. 2021 (arXiv:2101.08692). A tuple
        names one for each stage.
      stage_sizes: number of blocks in each stage.
      widths: channels of the 3x3 convolutions in each stage, before `base_width`.
      expansion: output channels of a bottleneck, as a multiple of its width.
      groups: of the 3x3 convolution (Xie et al. 2016, arXiv:1611.05431).
      group_width: channels a group; it sets `groups` where widths differ.
      base_width: the 3x3 has `width * base_width // 64 * groups` channels (ResNeXt;
        128: Zagoruyko & Komodakis 2016, arXiv:1605.07146, on bottlenecks).
      reduce_first: the first 1x1 has that many times fewer channels (SENet-154).
      pruned_widths: channels of the first two convolutions of every block of every
        stage, where they are irregular; `pruned_features`: outputs of each stage.

    Stem:
      stem: `(kernel, stride, width)` of each convolution.
      stem_pool: 3x3/2 pooling behind them: `max` (around it -inf), `max_zero_pad`
        (around it 0), `max_valid` (no border), `conv` (a 3x3/2 convolution, norm and
        activation: Bello et al. 2021, arXiv:2103.07579) or `none`.

    Shortcuts and strides:
      stride_at: where a bottleneck that shrinks its input has its stride: `3x3` (v1.5)
        or `1x1` (v1, He et al.). A basic block has it on its first convolution.
      stride_in: the `first` block of a stage has the stride, or the `last` (Keras V2,
        where the last stage has none).
      shortcut: where a block changes its shape: `projection` by convolution (option B),
        `pad` by subsampling and zero channels (option A), or `none` in all blocks: a
        plain network.
      shortcut_kernel: side of the projection's kernel where it has a stride.
      shortcut_pool: 2x2 average pooling carries the projection's stride (He et al.
        2018, arXiv:1812.01187, figure 2c).
      pad_channels: where option A puts the zero channels: at the `end`
        (fb.resnet.torch) or on `both` sides (akamaster/pytorch_resnet_cifar10).
      output_stride: the last stages dilate instead of striding so that the output is
        that many times smaller than the image; None: the strides' product.

    Inside a block:
      spatial: the 3x3 of a block: `conv`, `selective_kernel` (Li et al. 2019,
        arXiv:1903.06586), `split_attention` (Zhang et al. 2020, arXiv:2004.08955) or
        `hierarchical` (Gao et al. 2019, arXiv:1904.01169).
      scale: number of splits of `hierarchical`; radix: of `split_attention`.
      downsample_first: `split_attention` averages over 3x3 before its convolution
        where it has a stride, else behind.
      sk_split: each kernel of `selective_kernel` sees half of the channels.
      sk_ratio, sk_divisor: its inner channels as a part of the width, and what they
        are a multiple of.
      attention: `se` (Hu et al. 2017, arXiv:1709.01507), `eca` (Wang et al. 2019,
        arXiv:1910.03151) or None; at the end of the residual function.
      se_ratio: inner channels of `se` as a part of its input.
      anti_alias: strides blur: `avg` (2x2 average), `blur` (Zhang 2019,
        arXiv:1904.11486) or None.
      extra_conv: a second 3x3 in `norm_free` blocks.
      alpha: `norm_free`: factor of the residual function.
      skip_gain: `norm_free`: a learned scalar that starts at 0, for the same.
      scaled_at: `norm_free`: whether the gain that makes up for the activation's loss
        of variance is in the `activation` or the `convolution`.

    Layers:
      norm: `batch`, `group`, `evonorm_s0` (Liu et al. 2020, arXiv:2004.02967),
        `filter_response` (Singh & Krishnan 2019, arXiv:1911.09737) or `none`.
      norm_epsilon: added to the variance.
      norm_groups: number of groups of `group` and `evonorm_s0`.
      norm_momentum: keep-momentum, the fraction of the old running statistic that
        stays (torch's 0.1 is 0.9 here).
      norm_unbiased: whether the running variance is multiplied by n / (n - 1), as
        torch does; Flax and Keras do not.
      activation: `relu`, `gelu` or `silu`.
      weight_standardization: kernels are standardised (Qiao et al. 2019,
        arXiv:1903.10520), or `scaled` as well by 1 / sqrt(fan in) and a learned gain.
      standardization_epsilon: added to the kernel's variance.
      biased: the convolutions that have a bias: `stem`, `conv1` to `conv3`, `shortcut`,
        `final`.
      same_padding: TensorFlow's 'SAME' instead of (kernel - 1) // 2 on each side.

    Head:
      final_width: channels of a 1x1 convolution behind the last stage, or None.
      head_pool: side of the average pooling whose output is flattened; None: global.
      num_classes: size of the output; 0: the pooled features are the output.
      in_channels: channels of the input.

    Training:
      zero_init_last: whether each block's last norm scale (or kernel, where no norm
        follows) starts at zero, so that the block starts as its shortcut (Goyal et al.
        2017, arXiv:1706.02677, section 5.1).
      conv_init: `he_fan_out` (torchvision), `lecun_fan_in` or `glorot_uniform`.
      head_init_std: standard deviation of the normal distribution that the head's
        kernel starts from; None: torch's uniform(-1, 1) / sqrt(features), or glorot.
      head_bias: what the head's bias starts with; -log(classes) where the loss asks
        each class whether it is there, which few are.
      dropout: probability of each feature before the head.
      block_dropout: of each value between a block's 3x3 convolutions (wide ResNets).
      drop_path: highest probability that a block's residual function is left out for
        an example (Huang et al. 2016, arXiv:1603.09382); what stays is scaled up.
      drop_path_by: how the probability rises to it: from 0 in the first `block` on
        (timm), in proportion to the `depth` (Huang et al.), or by `stage` (ResNet-RS).
    """

    block: BlockName | tuple[BlockName, ...]
    stage_sizes: tuple[int, ...]
    widths: tuple[int, ...] = (64, 128, 256, 512)
    expansion: int = 4
    groups: int = 1
    group_width: int | None = None
    base_width: int = 64
    reduce_first: int = 1
    pruned_widths: tuple[tuple[tuple[int, int], ...], ...] | None = None
    pruned_features: tuple[int, ...] | None = None

    stem: tuple[tuple[int, int, int], ...] = ((7, 2, 64),)
    stem_pool: Literal["max", "max_zero_pad", "max_valid", "conv", "none"] = "max"

    stride_at: Literal["3x3", "1x1"] = "3x3"
    stride_in: Literal["first", "last"] = "first"
    shortcut: Literal["projection", "pad", "none"] = "projection"
    shortcut_kernel: int = 1
    shortcut_pool: bool = False
    pad_channels: Literal["end", "both"] = "end"
    output_stride: int | None = None

    spatial: Literal["conv", "selective_kernel", "split_attention", "hierarchical"] = (
        "conv"
    )
    scale: int = 4
    radix: int = 2
    downsample_first: bool = False
    sk_split: bool = True
    sk_ratio: float = 1 / 16
    sk_divisor: int = 8
    attention: Literal["se", "eca"] | None = None
    se_ratio: float = 1 / 16
    anti_alias: Literal["avg", "blur"] | None = None
    extra_conv: bool = False
    alpha: float = 1.0
    skip_gain: bool = False
    scaled_at: Literal["activation", "convolution"] = "convolution"

    norm: Literal["batch", "group", "evonorm_s0", "filter_response", "none"] = "batch"
    norm_epsilon: float = 1e-5
    norm_groups: int = 32
    norm_momentum: float = 0.9
    norm_unbiased: bool = True
    activation: Literal["relu", "gelu", "silu"] = "relu"
    weight_standardization: Literal["plain", "scaled"] | None = None
    standardization_epsilon: float = 1e-8
    biased: tuple[
        Literal["stem", "conv1", "conv2", "conv3", "shortcut", "final"], ...
    ] = ()
    same_padding: bool = False

    final_width: int | None = None
    head_pool: int | None = None
    num_classes: int = 1000
    in_channels: int = 3

    zero_init_last: bool = False
    conv_init: Literal["he_fan_out", "lecun_fan_in", "glorot_uniform"] = "he_fan_out"
    head_init_std: float | None = None
    head_bias: float = 0.0
    dropout: float = 0.0
    block_dropout: float = 0.0
    drop_path: float = 0.0
    drop_path_by: Literal["block", "depth", "stage"] = "block"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            # JSON and the command line give lists.
            value = _tuples(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            check_words(field, value)
        stages = len(self.stage_sizes)
        if len(self.widths) != stages:
            raise BadValueError(
                f"stage_sizes {self.stage_sizes} and widths {self.widths} must be of"
                " the same length: one entry per stage."
            )
        if isinstance(self.block, tuple) and len(self.block) != stages:
            raise BadValueError(
                f"block {self.block} must name one block, or one per stage."
            )
        for (name, value), kinds in KNOWN_BY.items():
            unaware = [kind for kind in self.blocks if kind not in kinds]
            if getattr(self, name) == value and unaware:
                raise BadValueError(
                    f"{name}={value!r} is not known by the block {unaware[0]}, only by"
                    f" {', '.join(kinds)}."
                )
        if self.block_dropout and set(self.blocks) != {"preact_basic"}:
            raise BadValueError(
                f"block_dropout={self.block_dropout} is known by the block"
                " preact_basic alone; dropout is before the head, drop_path leaves"
                " out whole blocks."
            )
        if self.output_stride and self.output_stride & (self.output_stride - 1):
            raise BadValueError(
                f"output_stride={self.output_stride} is not a power of two."
            )

    @property
    def blocks(self) -> tuple[str, ...]:
        """The kind of block of each stage."""
        if isinstance(self.block, str):
            return (self.block,) * len(self.stage_sizes)
        return self.block

    @property
    def preact(self) -> bool:
        """Whether activations come before the convolutions."""
        return self.blocks[0] in ("preact_basic", "preact_bottleneck", "norm_free")

    @property
    def for_small_images(self) -> bool:
        """Whether the stem keeps the image's size, as networks for CIFAR do."""
        strides = math.prod(stride for _, stride, _ in self.stem)
        return strides == 1 and self.stem_pool == "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """One block of a network; equal ones can be scanned.

    Attributes:
      kind: the name of the block.
      widths: channels of the first convolution and of the 3x3.
      features: channels of the output.
      attended: nominal number of features, from which `eca` has its kernel.
      groups: of the 3x3.
      stride: of the block.
      dilation: of the first 3x3 and of the following ones, in pixels.
      project: whether the shortcut changes the shape.
      drop_path: probability that the residual function is left out.
      beta: `norm_free`: 1 / standard deviation that is expected of the input.
    """

    kind: str
    widths: tuple[int, int]
    features: int
    attended: int
    groups: int
    stride: int
    dilation: tuple[int, int]
    project: bool
    drop_path: float
    beta: float

    def alike(self) -> "BlockPlan":
        """The plan without the numbers that a scan hands to each of its blocks."""
        return dataclasses.replace(self, drop_path=0.0, beta=1.0)


def plan_blocks(spec: ResNetSpec) -> tuple[tuple[BlockPlan, ...], ...]:
    """What each block of each stage is.

    Strides that would shrink the output beyond `spec.output_stride` become dilation.
    """
    total = math.prod(stride for _, stride, _ in spec.stem)
    total *= 1 if spec.stem_pool == "none" else 2
    channels = spec.stem[-1][2]
    dilation, variance = 1, 1.0
    number, depth = 0, sum(spec.stage_sizes)
    plans = []
    for i, size in enumerate(spec.stage_sizes):
        kind = spec.blocks[i]
        expansion = 1 if kind.endswith("basic") else spec.expansion
        nominal = spec.widths[i] * expansion
        features = spec.pruned_features[i] if spec.pruned_features else nominal
        at_end = spec.stride_in == "last"
        strided = i < len(spec.stage_sizes) - 1 if at_end else i > 0
        before = dilation
        stage_stride = 2 if strided else 1
        if strided and spec.output_stride and total >= spec.output_stride:
            dilation, stage_stride = 2 * dilation, 1
        total *= stage_stride
        stage = []
        for j in range(size):
            here = strided and j == (size - 1 if at_end else 0)
            width = spec.widths[i] * spec.base_width // 64
            groups = spec.groups
            if spec.group_width:
                groups = width // spec.group_width
            inner = width * spec.groups
            widths = (inner // spec.reduce_first, inner)
            if spec.spatial == "hierarchical":
                widths = (inner * spec.scale, inner)
            if kind.endswith("basic"):
                widths = (spec.widths[i], spec.widths[i])
            if spec.pruned_widths:
                widths = spec.pruned_widths[i][j]
            # The convolution that would have had the stride still sees pixels that are
            # as far apart as before it.
            first = before if j == 0 or at_end else dilation
            last = before if at_end else dilation
            stage.append(
                BlockPlan(
                    kind=kind,
                    widths=widths,
                    features=features,
                    attended=nominal,
                    groups=groups,
                    stride=stage_stride if here else 1,
                    dilation=(first, last),
                    project=channels != features or here,
                    drop_path=_drop_path(spec, number, depth, i),
                    beta=variance**-0.5,
                )
            )
            if j == 0:
                variance = 1.0
            variance += spec.alpha**2
            channels = features
            number += 1
        plans.append(tuple(stage))
    return tuple(plans)


def _drop_path(spec: ResNetSpec, block: int, depth: int, stage: int) -> float:
    if spec.drop_path_by == "block":
        return spec.drop_path * block / max(depth - 1, 1)
    if spec.drop_path_by == "depth":
        return spec.drop_path * (block + 1) / depth
    # ResNet-RS counts the stem as the first of five groups.
    return spec.drop_path * (stage + 2) / (len(spec.stage_sizes) + 1)


def check_words(field: dataclasses.Field, value) -> None:
    """Raises BadValueError if a string is none of those that a field allows."""
    allowed = _words(field.type)
    for word in value if isinstance(value, tuple) else (value,):
        if isinstance(word, str) and allowed and word not in allowed:
            raise BadValueError(
                f"{field.name}={word!r} is not one of {', '.join(allowed)}."
            )


def _words(annotation) -> tuple[str, ...]:
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return tuple(
        dict.fromkeys(
            word
            for part in typing.get_args(annotation)
            if not isinstance(part, types.EllipsisType)
            for word in _words(part)
        )
    )


def _tuples(value):
    if isinstance(value, list | tuple):
        return tuple(_tuples(part) for part in value)
    return value
