"""Residual networks as data: the specs that `ResNet` builds and `zoo.py` lists."""

import dataclasses
import math
import numbers
import types
import typing
from typing import Any, Literal

from resnet_jax.errors import BadValueError

BlockName = Literal[
    "basic", "bottleneck", "preact_basic", "preact_bottleneck", "norm_free"
]

# More blocks than JAX traces in an hour.
MOST_BLOCKS = 10_000
# Values that only some kinds of block implement. Other blocks would silently ignore
# them, so a spec that combines them is rejected.
SUPPORTED_BLOCKS: dict[tuple[str, object], tuple[BlockName, ...]] = {
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
    """A residual network as data: everything that distinguishes it from another one.

    Lists, as JSON and the command line give them, become tuples. A spec that
    contradicts itself raises BadValueError.

    Attributes: Blocks and widths
      block: The kind of block: `basic` (two 3x3) or `bottleneck` (1x1, 3x3, 1x1), He et
        al. 2015 (arXiv:1512.03385), figure 5; `preact_basic` and `preact_bottleneck`,
        the same with norm and activation before each convolution, He et al. 2016
        (arXiv:1603.05027); `norm_free`, Brock et al. 2021 (arXiv:2101.08692). A tuple
        names one for each stage.
      stage_sizes: The number of blocks in each stage.
      widths: The channels of the 3x3 convolutions in each stage, before `base_width`.
      expansion: The output channels of a bottleneck, as a multiple of its width.
      groups: The number of groups of the 3x3 convolution (Xie et al. 2016,
        arXiv:1611.05431).
      group_width: The channels of a group, for networks whose number of groups differs
        between stages. None: `groups` is the number of groups.
      base_width: The width factor times 64: the 3x3 convolution has
        `width * base_width // 64 * groups` channels (ResNeXt; 128 in Zagoruyko &
        Komodakis 2016, arXiv:1605.07146, on bottlenecks).
      reduce_first: The factor by which the first 1x1 convolution has fewer channels
        than the 3x3 (SENet-154).
      pruned_widths: The channels of the first two convolutions of every block of every
        stage, if they are irregular; otherwise None.
      pruned_features: The output channels of each stage, if they are irregular;
        otherwise None.

    Attributes: Stem
      stem: The tuple `(kernel, stride, width)` of each convolution.
      stem_pool: The 3x3/2 pooling after the stem's convolutions: `max` (padded with
        -inf), `max_zero_pad` (padded with 0), `max_valid` (not padded), `conv` (a 3x3/2
        convolution, norm and activation: Bello et al. 2021, arXiv:2103.07579) or
        `none`.

    Attributes: Shortcuts and strides
      stride_at: The convolution of a strided bottleneck that has the stride: `3x3`
        (v1.5) or `1x1` (v1, He et al.). A basic block has it at its first convolution.
      stride_in: The block of a stage that has the stride: the `first`, or the `last`
        (Keras V2, whose last stage has no stride).
      shortcut: The shortcut of blocks that change the shape: `projection` by
        convolution (option B) or `pad` by subsampling and zero channels (option A).
        `none`: no block has a shortcut, which makes a plain network.
      shortcut_kernel: The side of a strided projection's kernel in pixels.
      shortcut_pool: True if 2x2 average pooling carries the projection's stride (He et
        al. 2018, arXiv:1812.01187, figure 2c).
      pad_channels: The place of option A's zero channels: at the `end`
        (fb.resnet.torch) or on `both` sides (akamaster/pytorch_resnet_cifar10).
      output_stride: The largest ratio of the image's side to the output's side. Strides
        that would exceed it become dilation. None: the product of all strides.

    Attributes: Inside a block
      spatial: The 3x3 convolution of a block: `conv`, `selective_kernel` (Li et al.
        2019, arXiv:1903.06586), `split_attention` (Zhang et al. 2020,
        arXiv:2004.08955) or `hierarchical` (Gao et al. 2019, arXiv:1904.01169).
      scale: The number of splits of `hierarchical`.
      radix: The number of splits of `split_attention`.
      downsample_first: True if a strided `split_attention` applies its 3x3 average
        pooling before the convolution rather than after it.
      sk_split: True if each kernel of `selective_kernel` sees one half of the channels.
      sk_ratio: The inner channels of `selective_kernel`, as a fraction of the width.
      sk_divisor: The number that the inner channels of `selective_kernel` are rounded
        to a multiple of.
      attention: The attention at the end of the residual function: `se` (Hu et al.
        2017, arXiv:1709.01507), `eca` (Wang et al. 2019, arXiv:1910.03151) or None.
      se_ratio: The inner channels of `se`, as a fraction of its input's.
      anti_alias: The blur that carries the strides: `avg` (2x2 average), `blur` (Zhang
        2019, arXiv:1904.11486) or None.
      extra_conv: True if a `norm_free` block has a second 3x3 convolution.
      alpha: The factor of a `norm_free` block's residual function.
      skip_gain: True if a learned scalar that starts at 0 multiplies a `norm_free`
        block's residual function.
      scaled_at: The place of a `norm_free` network's gain, which restores the variance
        that the activation removes: the `activation` or the `convolution`.

    Attributes: Layers
      norm: The normalisation: `batch`, `group`, `evonorm_s0` (Liu et al. 2020,
        arXiv:2004.02967), `filter_response` (Singh & Krishnan 2019, arXiv:1911.09737)
        or `none`.
      norm_epsilon: The number that is added to the variance.
      norm_groups: The number of channel groups of `group` and `evonorm_s0`.
      norm_momentum: The decay rate of the running statistics: the fraction of the old
        value that stays in an update (torch's momentum 0.1 is 0.9 here).
      norm_unbiased: True if the running variance is multiplied by n / (n - 1), as in
        torch; Flax and Keras do not multiply it.
      activation: The activation: `relu`, `gelu` or `silu`.
      weight_standardization: The standardisation of kernels: `plain` (Qiao et al. 2019,
        arXiv:1903.10520), `scaled` (also multiplied by 1 / sqrt(fan in) and a learned
        gain) or None.
      standardization_epsilon: The number that is added to a kernel's variance.
      biased: The convolutions that have a bias: `stem`, `conv1` to `conv3`, `shortcut`,
        `final`.
      same_padding: True to pad as TensorFlow's 'SAME' does, instead of with
        (kernel - 1) // 2 pixels on each side.

    Attributes: Head
      final_width: The channels of a 1x1 convolution after the last stage, or None.
      head_pool: The side in pixels of the average pooling whose output is flattened.
        None: global average pooling.
      num_classes: The number of logits. 0: the pooled features are the output.
      in_channels: The channels of the input.

    Attributes: Training
      zero_init_last: True if each block's last norm scale (or its kernel, if no norm
        follows) starts at zero, so that the block starts as its shortcut (Goyal et al.
        2017, arXiv:1706.02677, section 5.1).
      conv_init: The initialiser of convolutions: `he_fan_out` (torchvision),
        `lecun_fan_in` or `glorot_uniform`.
      head_init_std: The standard deviation of the normal distribution that initialises
        the head's kernel. None: torch's uniform(-1, 1) / sqrt(features), or
        glorot_uniform if that is `conv_init`.
      head_bias: The initial value of the head's bias. -log(classes) suits binary cross
        entropy, since few classes are present in an image.
      dropout: The probability that a feature before the head is dropped.
      block_dropout: The probability that a value between a block's 3x3 convolutions is
        dropped (wide ResNets).
      drop_path: The highest probability that a block's residual function is dropped for
        an example (Huang et al. 2016, arXiv:1603.09382); kept values are scaled up.
      drop_path_by: The rule by which the probability rises to `drop_path`: from 0 in
        the first `block` (timm), in proportion to the `depth` (Huang et al.), or by
        `stage` (ResNet-RS).

    Examples:
      >>> from resnet_jax.models import ResNetSpec
      >>> spec = ResNetSpec(block="basic", stage_sizes=(2, 2, 2), widths=(16, 32, 64))
      >>> spec.blocks
      ('basic', 'basic', 'basic')
      >>> ResNetSpec(block="basic", stage_sizes=(2, 2))  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      resnet_jax.errors.BadValueError: stage_sizes (2, 2) and widths ...
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
        check_fields(self)
        for name in ("norm_epsilon", "standardization_epsilon", "head_init_std"):
            if (getattr(self, name) or 0) < 0:
                raise BadValueError(f"{name}={getattr(self, name)} must be at least 0.")
        for name in ("sk_ratio", "se_ratio"):
            if getattr(self, name) <= 0:
                raise BadValueError(f"{name}={getattr(self, name)} must be above 0.")
        if not self.stem or not self.stage_sizes:
            raise BadValueError("stem and stage_sizes must have at least one entry.")
        stages = len(self.stage_sizes)
        if len(self.widths) != stages:
            raise BadValueError(
                f"stage_sizes {self.stage_sizes} and widths {self.widths} must have"
                " the same length: one entry per stage."
            )
        if self.pruned_features and len(self.pruned_features) != stages:
            raise BadValueError(
                f"pruned_features {self.pruned_features} must have one entry per stage."
            )
        blocks = tuple(map(len, self.pruned_widths or ()))
        if blocks and blocks != self.stage_sizes:
            raise BadValueError(
                f"pruned_widths has entries for {blocks} blocks, but stage_sizes are"
                f" {self.stage_sizes}."
            )
        if sum(self.stage_sizes) > MOST_BLOCKS:
            raise BadValueError(
                f"stage_sizes {self.stage_sizes} have more than {MOST_BLOCKS:,} blocks."
            )
        if isinstance(self.block, tuple) and len(self.block) != stages:
            raise BadValueError(
                f"block {self.block} must name one block, or one per stage."
            )
        for (name, value), kinds in SUPPORTED_BLOCKS.items():
            unsupported = [kind for kind in self.blocks if kind not in kinds]
            if getattr(self, name) == value and unsupported:
                raise BadValueError(
                    f"{name}={value!r} is not supported by the block {unsupported[0]}."
                    f" Use one of these blocks: {', '.join(kinds)}."
                )
        if self.block_dropout and set(self.blocks) != {"preact_basic"}:
            raise BadValueError(
                f"block_dropout={self.block_dropout} is supported by the block"
                " preact_basic only. Use dropout (before the head) or drop_path"
                " (whole blocks) instead."
            )
        if self.output_stride and self.output_stride & (self.output_stride - 1):
            raise BadValueError(
                f"output_stride={self.output_stride} is not a power of two."
            )

    @property
    def blocks(self) -> tuple[BlockName, ...]:
        """The kind of block of each stage."""
        if isinstance(self.block, str):
            return (self.block,) * len(self.stage_sizes)
        return self.block

    @property
    def preact(self) -> bool:
        """Tells whether activations precede the convolutions."""
        return self.blocks[0] in ("preact_basic", "preact_bottleneck", "norm_free")

    @property
    def for_small_images(self) -> bool:
        """Tells whether the stem keeps the image's size, as for CIFAR."""
        strides = math.prod(stride for _, stride, _ in self.stem)
        return strides == 1 and self.stem_pool == "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """The shape of one block of a network; blocks with equal shapes can be scanned.

    Attributes:
      kind: The kind of block.
      widths: The channels of the first convolution and of the 3x3 convolution.
      features: The channels of the output.
      nominal_features: The channels of the output before pruning, which set the kernel
        size of `eca`.
      groups: The number of groups of the 3x3 convolution.
      stride: The stride of the block.
      dilation: The dilation in pixels of the first 3x3 convolution and of the others.
      project: True if the shortcut changes the shape.
      drop_path: The probability that the residual function is dropped.
      beta: The factor of a `norm_free` block's input: one over the standard deviation
        that is expected of it.
    """

    kind: BlockName
    widths: tuple[int, int]
    features: int
    nominal_features: int
    groups: int
    stride: int
    dilation: tuple[int, int]
    project: bool
    drop_path: float
    beta: float

    def shape(self) -> "BlockPlan":
        """Returns the plan without the numbers that a scan passes to each block."""
        return dataclasses.replace(self, drop_path=0.0, beta=1.0)

    def numbers(self) -> dict[str, float]:
        """Returns the arguments of the block that may differ inside of a scan."""
        if self.kind == "norm_free":
            return {"drop_path": self.drop_path, "beta": self.beta}
        return {"drop_path": self.drop_path}


def plan_blocks(spec: ResNetSpec) -> tuple[tuple[BlockPlan, ...], ...]:
    """Returns the plan of each block of each stage.

    Strides that would shrink the output beyond `spec.output_stride` become dilation.

    Examples:
      >>> from resnet_jax.models import get_spec
      >>> stages = plan_blocks(get_spec("resnet50"))
      >>> [(len(stage), stage[0].stride, stage[0].features) for stage in stages]
      [(3, 1, 256), (4, 2, 512), (6, 2, 1024), (3, 2, 2048)]
    """
    total_stride = math.prod(stride for _, stride, _ in spec.stem)
    total_stride *= 1 if spec.stem_pool == "none" else 2
    channels = spec.stem[-1][2]
    dilation, variance = 1, 1.0
    number, depth = 0, sum(spec.stage_sizes)
    plans = []
    for i, size in enumerate(spec.stage_sizes):
        kind = spec.blocks[i]
        expansion = 1 if kind.endswith("basic") else spec.expansion
        nominal = spec.widths[i] * expansion
        features = spec.pruned_features[i] if spec.pruned_features else nominal
        stride_at_end = spec.stride_in == "last"
        strided = i < len(spec.stage_sizes) - 1 if stride_at_end else i > 0
        dilation_before = dilation
        stage_stride = 2 if strided else 1
        if strided and spec.output_stride and total_stride >= spec.output_stride:
            dilation, stage_stride = 2 * dilation, 1
        total_stride *= stage_stride
        stage = []
        for j in range(size):
            has_stride = strided and j == (size - 1 if stride_at_end else 0)
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
            # The convolution whose stride became dilation still sees pixels that are
            # as far apart as before it.
            first = dilation_before if j == 0 or stride_at_end else dilation
            last = dilation_before if stride_at_end else dilation
            stage.append(
                BlockPlan(
                    kind=kind,
                    widths=widths,
                    features=features,
                    nominal_features=nominal,
                    groups=groups,
                    stride=stage_stride if has_stride else 1,
                    dilation=(first, last),
                    project=channels != features or has_stride,
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


def as_tuples(value: Any) -> Any:
    """Turns the lists of JSON and of the command line, at any depth, into tuples."""
    if isinstance(value, list | tuple):
        return tuple(as_tuples(part) for part in value)
    return value


def check_fields(spec: Any) -> None:
    """Makes tuples of the lists in a spec's fields, and checks types and ranges.

    Args:
      spec: A frozen dataclass that describes a network.

    Raises:
      BadValueError: A field has a value of another type, or one out of its range.
    """
    for field in dataclasses.fields(spec):
        value = as_tuples(getattr(spec, field.name))
        object.__setattr__(spec, field.name, value)
        _check_literals(field, value)
        # Without classes a network ends with its features.
        is_headless = field.name == "num_classes" and value == 0
        if not is_headless and not _fits(field.type, value):
            is_plain = not typing.get_args(field.type)
            kind = getattr(field.type, "__name__", "") if is_plain else field.type
            raise BadValueError(
                f"{field.name}={value!r} is not of the type {kind}, of which whole"
                " numbers are at least 1."
            )
    for name in ("dropout", "block_dropout", "drop_path", "norm_momentum"):
        if not 0 <= getattr(spec, name, 0) <= 1:
            raise BadValueError(f"{name}={getattr(spec, name)} must be from 0 to 1.")


def _check_literals(field: dataclasses.Field, value: Any) -> None:
    allowed = _literals(field.type)
    for word in value if isinstance(value, tuple) else (value,):
        if isinstance(word, str) and allowed and word not in allowed:
            raise BadValueError(
                f"{field.name}={word!r} is not one of {', '.join(allowed)}."
            )


def _fits(annotation: Any, value: Any) -> bool:
    """Tells whether a value has the type of a field; sizes are at least 1."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is Literal:
        return value in parts
    if isinstance(annotation, types.UnionType) or (
        typing.get_origin(annotation) is typing.Union
    ):
        return any(_fits(part, value) for part in parts)
    if typing.get_origin(annotation) is tuple:
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            parts = parts[:1] * len(value)
        return len(parts) == len(value) and all(map(_fits, parts, value))
    if isinstance(value, bool):
        return annotation is bool
    # Numbers of numpy are numbers, too.
    if annotation is int:
        is_whole = isinstance(value, numbers.Integral)
        return is_whole and 0 < value < 2**31
    if annotation is float:
        is_real = isinstance(value, numbers.Real)
        return is_real and abs(value) < 3e38
    return isinstance(value, annotation)


def _literals(annotation: Any) -> tuple[str, ...]:
    """Returns the strings that an annotation allows; none if it allows any."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    return tuple(
        dict.fromkeys(
            word
            for part in typing.get_args(annotation)
            if not isinstance(part, types.EllipsisType)
            for word in _literals(part)
        )
    )
