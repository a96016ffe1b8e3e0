"""The table of networks, the only list of variants: name -> spec, parameters, paper."""

import dataclasses
import fnmatch
import logging
from typing import Any

import flax.linen as nn
from jax.typing import DTypeLike

from resnet_jax.errors import BadValueError, UserError, check_known, nearest
from resnet_jax.models.baselines import VGG, Highway, HighwaySpec, VGGSpec
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.spec import BlockName, ResNetSpec

log = logging.getLogger(__name__)

Sizes = tuple[int, ...]
Spec = ResNetSpec | VGGSpec | HighwaySpec

RESNET = "He et al. 2015, arXiv:1512.03385"
PREACT = "He et al. 2016, arXiv:1603.05027"
DEPTH = "Huang et al. 2016, arXiv:1603.09382"
WIDE = "Zagoruyko & Komodakis 2016, arXiv:1605.07146"
RESNEXT = "Xie et al. 2016, arXiv:1611.05431"
SE = "Hu et al. 2017, arXiv:1709.01507"
TRICKS = "He et al. 2018, arXiv:1812.01187"
GROUP = "Wu & He 2018, arXiv:1803.08494"
SK = "Li et al. 2019, arXiv:1903.06586"
BLUR = "Zhang 2019, arXiv:1904.11486"
RES2NET = "Gao et al. 2019, arXiv:1904.01169"
ECA = "Wang et al. 2019, arXiv:1910.03151"
BIT = "Kolesnikov et al. 2019, arXiv:1912.11370"
ASSEMBLED = "Lee et al. 2020, arXiv:2001.06268"
EVONORM = "Liu et al. 2020, arXiv:2004.02967"
FRN = "Singh & Krishnan 2019, arXiv:1911.09737"
RESNEST = "Zhang et al. 2020, arXiv:2004.08955"
NF_RESNET = "Brock et al. 2021, arXiv:2101.08692"
NFNET = "Brock et al. 2021, arXiv:2102.06171"
RS = "Bello et al. 2021, arXiv:2103.07579"
TIMM = "Wightman et al. 2021, arXiv:2110.00476"
VGG_PAPER = "Simonyan & Zisserman 2014, arXiv:1409.1556"
HIGHWAY = "Srivastava et al. 2015, arXiv:1507.06228"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of the zoo: one network.

    Attributes:
      spec: The network as data.
      params: The exact number of its parameters, without running statistics.
      paper: The authors and the arXiv identifier of the paper that introduced it.
      oracle: The implementation that `make test-oracles` tests it against: `timm`,
        `torchvision`, `keras`, or `torch` for a transcription of the authors' code in
        tests/oracles; "" if only the number of parameters is tested.
      scheme: The naming scheme of its weights, a key of `resnet_jax.weights.SCHEMES`.
      top1: The published top-1 accuracy in percent, on ImageNet (or CIFAR-10), or
        None.
      top1_source: The publisher of that accuracy and, if known, its training.
    """

    spec: Spec
    params: int
    paper: str = RESNET
    oracle: str = "timm"
    scheme: str = "timm"
    top1: float | None = None
    top1_source: str = ""

    @property
    def image_size(self) -> int:
        """The side in pixels of the images that the table's figures are for."""
        if self.spec.for_small_images:
            return 32
        return 64 if getattr(self.spec, "head_pool", None) else 224


# Stage sizes by depth. S14, S26 and S50 are also those of the depths 10, 18 and 34
# of basic blocks.
S14, S26, S50 = (1, 1, 1, 1), (2, 2, 2, 2), (3, 4, 6, 3)
S101, S152, S200 = (3, 4, 23, 3), (3, 8, 36, 3), (3, 24, 36, 3)
S269 = (3, 30, 48, 8)

# The variants C and D of He et al. 2018, S of Gluon, and T and E of timm have three 3x3
# convolutions as stem. In D, E and T the shortcuts also pool.
STEM_C = ((3, 2, 32), (3, 1, 32), (3, 1, 64))
STEM_S = ((3, 2, 64), (3, 1, 64), (3, 1, 128))
STEM_T = ((3, 2, 24), (3, 1, 32), (3, 1, 64))
C: dict[str, Any] = {"stem": STEM_C}
D: dict[str, Any] = {"stem": STEM_C, "shortcut_pool": True}
E: dict[str, Any] = {"stem": STEM_S, "shortcut_pool": True}
T: dict[str, Any] = {"stem": STEM_T, "shortcut_pool": True}


def _x(groups: int, base_width: int) -> dict[str, Any]:
    return {"groups": groups, "base_width": base_width}


def _timm(
    block: BlockName | tuple[BlockName, ...],
    sizes: Sizes,
    params: int,
    paper: str = RESNET,
    top1: float | None = None,
    tag: str = "",
    **fields: Any,
) -> Entry:
    fields = {"zero_init_last": True} | fields
    spec = ResNetSpec(block=block, stage_sizes=sizes, **fields)
    source = f"timm, {tag}" if tag else ""
    return Entry(spec, params, paper, "timm", "timm", top1, source)


def _basic(sizes: Sizes, params: int, paper: str = RESNET, **fields: Any) -> Entry:
    return _timm("basic", sizes, params, paper, **fields)


def _bottle(sizes: Sizes, params: int, paper: str = RESNET, **fields: Any) -> Entry:
    return _timm("bottleneck", sizes, params, paper, **fields)


def _rs(sizes: Sizes, params: int, top1: float, image_size: int) -> Entry:
    fields = D | {"stem_pool": "conv", "attention": "se", "se_ratio": 0.25}
    return _bottle(sizes, params, RS, top1=top1, tag=f"at {image_size} px", **fields)


def _sk(
    block: BlockName,
    sizes: Sizes,
    params: int,
    top1: float | None = None,
    **fields: Any,
) -> Entry:
    fields = {"spatial": "selective_kernel", "zero_init_last": False} | fields
    if block == "basic":
        fields |= {"sk_ratio": 1 / 8, "sk_divisor": 16}
    tag = "ra_in1k" if top1 else ""
    return _timm(block, sizes, params, SK, top1=top1, tag=tag, **fields)


def _resnest(
    sizes: Sizes,
    params: int,
    top1: float | None = None,
    image_size: int = 224,
    **fields: Any,
) -> Entry:
    fields = D | {"spatial": "split_attention"} | fields
    entry = _bottle(sizes, params, RESNEST, top1=top1, **fields)
    source = f"the authors, at {image_size} px" if top1 else ""
    return dataclasses.replace(entry, top1_source=source)


def _res2net(
    sizes: Sizes,
    params: int,
    base_width: int,
    scale: int,
    top1: float | None = None,
    **fields: Any,
) -> Entry:
    fields |= {"spatial": "hierarchical", "base_width": base_width, "scale": scale}
    entry = _bottle(sizes, params, RES2NET, top1=top1, **fields)
    return dataclasses.replace(entry, top1_source="the authors" if top1 else "")


def _timm_v2(
    block: BlockName,
    sizes: Sizes,
    params: int,
    paper: str = PREACT,
    top1: float | None = None,
    tag: str = "",
    **fields: Any,
) -> Entry:
    fields = {"head_init_std": 0.01} | fields
    spec = ResNetSpec(block=block, stage_sizes=sizes, **fields)
    source = f"timm, {tag}" if tag else ""
    return Entry(spec, params, paper, "timm", "timm_v2", top1, source)


def _bit(sizes: Sizes, params: int, width: int, top1: float, image_size: int) -> Entry:
    return _timm_v2(
        "preact_bottleneck",
        sizes,
        params,
        BIT,
        widths=tuple(width * w for w in (64, 128, 256, 512)),
        stem=((7, 2, 64 * width),),
        stem_pool="max_zero_pad",
        norm="group",
        weight_standardization="plain",
        standardization_epsilon=1e-8,
        top1=top1,
        tag=f"goog_in21k_ft_in1k at {image_size} px",
    )


def _norm_free(
    sizes: Sizes, params: int, paper: str, top1: float | None = None, **fields: Any
) -> Entry:
    spec = ResNetSpec(
        block="norm_free",
        stage_sizes=sizes,
        norm="none",
        shortcut_pool=True,
        alpha=0.2,
        weight_standardization="scaled",
        standardization_epsilon=1e-5,
        biased=("stem", "conv1", "conv2", "conv3", "shortcut", "final"),
        conv_init="lecun_fan_in",
        head_init_std=0.01,
        **fields,
    )
    source = "the authors" if top1 else ""
    return Entry(spec, params, paper, "timm", "timm_nf", top1, source)


def _nfnet(times: int, params: int, top1: float | None = None) -> Entry:
    fields: dict[str, Any] = {
        "widths": (128, 256, 768, 768),
        "expansion": 2,
        "group_width": 128,
        "stem": ((3, 2, 16), (3, 1, 32), (3, 1, 64), (3, 2, 128)),
        "stem_pool": "none",
        "extra_conv": True,
        "attention": "se",
        "se_ratio": 0.5,
        "activation": "gelu",
        "final_width": 3072,
    }
    # The networks with an accuracy are DeepMind's, which differ from timm's nfnet_f*.
    if top1:
        fields |= {"same_padding": True, "skip_gain": True, "scaled_at": "activation"}
    sizes = tuple(times * n for n in (1, 2, 6, 3))
    return _norm_free(sizes, params, NFNET, top1, **fields)


def _change(
    entry: Entry, fields: dict[str, Any], oracle: str, top1: float | None, source: str
) -> Entry:
    """Returns an entry with some fields of its spec replaced."""
    spec = dataclasses.replace(entry.spec, **fields)
    return dataclasses.replace(
        entry, spec=spec, oracle=oracle, top1=top1, top1_source=source
    )


def _torchvision(timm: Entry, top1: float) -> Entry:
    # The function is the same, but torchvision starts every block's last scale at one.
    fields = {"zero_init_last": False}
    source = "torchvision, IMAGENET1K_V1"
    return _change(timm, fields, "torchvision", top1, source)


def _v1(v1_5: Entry) -> Entry:
    fields = {"stride_at": "1x1", "zero_init_last": False}
    return _change(v1_5, fields, "torch", None, "")


KERAS_NORM: dict[str, Any] = {"norm_momentum": 0.99, "norm_unbiased": False}


def _keras(sizes: Sizes, params: int, top1: float) -> Entry:
    spec = ResNetSpec(
        block="bottleneck",
        stage_sizes=sizes,
        stride_at="1x1",
        stem_pool="max_zero_pad",
        biased=("stem", "conv1", "conv2", "conv3", "shortcut"),
        norm_epsilon=1.001e-5,
        conv_init="glorot_uniform",
        **KERAS_NORM,
    )
    return Entry(spec, params, RESNET, "keras", "keras", top1, "Keras Applications")


def _keras_v2(sizes: Sizes, params: int, top1: float) -> Entry:
    spec = ResNetSpec(
        block="preact_bottleneck",
        stage_sizes=sizes,
        stride_in="last",
        stem_pool="max_zero_pad",
        biased=("stem", "conv3", "shortcut"),
        norm_epsilon=1.001e-5,
        conv_init="glorot_uniform",
        **KERAS_NORM,
    )
    return Entry(spec, params, PREACT, "keras", "keras", top1, "Keras Applications")


def _cifar(depth: int, params: int, top1: float | None = None, **fields: Any) -> Entry:
    # Section 4.2 of the paper: depth = 6 n + 2.
    n = (depth - 2) // 6
    spec = ResNetSpec(
        block="basic",
        stage_sizes=(n, n, n),
        widths=(16, 32, 64),
        stem=((3, 1, 16),),
        stem_pool="none",
        num_classes=10,
        **{"shortcut": "pad"} | fields,
    )
    source = "the paper, CIFAR-10" if top1 else ""
    return Entry(spec, params, RESNET, "torch", "timm", top1, source)


def _akamaster(depth: int, params: int, top1: float) -> Entry:
    entry = _cifar(depth, params, top1, pad_channels="both")
    source = "akamaster/pytorch_resnet_cifar10, CIFAR-10"
    return dataclasses.replace(entry, scheme="akamaster", top1_source=source)


def _stochastic_depth(depth: int, params: int, top1: float) -> Entry:
    entry = _cifar(depth, params, top1, drop_path=0.5, drop_path_by="depth")
    return dataclasses.replace(entry, paper=DEPTH)


def _preact_cifar(
    block: BlockName, n: int, params: int, top1: float | None, **fields: Any
) -> Entry:
    spec = ResNetSpec(
        block=block,
        stage_sizes=(n, n, n),
        stem=((3, 1, 16),),
        stem_pool="none",
        num_classes=10,
        **{"widths": (16, 32, 64)} | fields,
    )
    return Entry(spec, params, PREACT, "torch", "timm_v2", top1, "the paper, CIFAR-10")


def _wide(depth: int, k: int, params: int, top1: float | None = None) -> Entry:
    widths = (16 * k, 32 * k, 64 * k)
    entry = _preact_cifar("preact_basic", (depth - 4) // 6, params, top1, widths=widths)
    source = entry.top1_source if top1 else ""
    return dataclasses.replace(entry, paper=WIDE, top1_source=source)


def _plain(entry: Entry, params: int) -> Entry:
    fields = {"shortcut": "none", "zero_init_last": False}
    entry = _change(entry, fields, "torch", None, "")
    return dataclasses.replace(entry, params=params)


def _resnext_cifar(cardinality: int, params: int, top1: float) -> Entry:
    spec = ResNetSpec(
        block="bottleneck",
        stage_sizes=(3, 3, 3),
        widths=(64, 128, 256),
        groups=cardinality,
        stem=((3, 1, 64),),
        stem_pool="none",
        num_classes=10,
    )
    source = "the paper, CIFAR-10"
    return Entry(spec, params, RESNEXT, "torch", "timm", top1, source)


def _tutorial_torch(timm: Entry) -> Entry:
    return _change(timm, {"zero_init_last": False}, "torch", None, "")


# `list_models` keeps this order.
ZOO: dict[str, Entry] = {
    # timm/models/resnet.py: all of its entry points, in its order.
    "resnet10t": _basic(S14, 5_435_488, TRICKS, **T),
    "resnet14t": _bottle(S14, 10_081_632, TRICKS, top1=72.24, tag="c3_in1k", **T),
    "resnet18": _basic(S26, 11_689_512, top1=69.758, tag="tv_in1k"),
    "resnet18d": _basic(S26, 11_708_744, TRICKS, top1=72.30, tag="ra2_in1k", **D),
    "resnet34": _basic(S50, 21_797_672, top1=73.314, tag="tv_in1k"),
    "resnet34d": _basic(S50, 21_816_904, TRICKS, top1=77.11, tag="ra2_in1k", **D),
    "resnet26": _bottle(S26, 15_995_176, top1=75.30, tag="bt_in1k"),
    "resnet26t": _bottle(
        S26, 16_011_872, TRICKS, top1=77.88, tag="ra2_in1k at 256 px", **T
    ),
    "resnet26d": _bottle(S26, 16_014_408, TRICKS, top1=76.70, tag="bt_in1k", **D),
    "resnet50": _bottle(S50, 25_557_032, top1=76.130, tag="tv_in1k"),
    "resnet50c": _bottle(S50, 25_576_264, TRICKS, top1=78.02, tag="gluon_in1k", **C),
    "resnet50d": _bottle(S50, 25_576_264, TRICKS, top1=80.55, tag="ra2_in1k", **D),
    "resnet50s": _bottle(
        S50, 25_680_808, TRICKS, top1=78.71, tag="gluon_in1k", stem=STEM_S
    ),
    "resnet50t": _bottle(S50, 25_573_728, TRICKS, **T),
    "resnet101": _bottle(S101, 44_549_160, top1=77.374, tag="tv_in1k"),
    "resnet101c": _bottle(S101, 44_568_392, TRICKS, top1=79.54, tag="gluon_in1k", **C),
    "resnet101d": _bottle(
        S101, 44_568_392, TRICKS, top1=82.25, tag="ra2_in1k at 256 px", **D
    ),
    "resnet101s": _bottle(S101, 44_672_936, TRICKS, stem=STEM_S),
    "resnet152": _bottle(S152, 60_192_808, top1=78.312, tag="tv_in1k"),
    "resnet152c": _bottle(S152, 60_212_040, TRICKS, top1=79.90, tag="gluon_in1k", **C),
    "resnet152d": _bottle(
        S152, 60_212_040, TRICKS, top1=83.16, tag="ra2_in1k at 256 px", **D
    ),
    "resnet152s": _bottle(S152, 60_316_584, TRICKS, stem=STEM_S),
    "resnet200": _bottle(S200, 64_673_832),
    "resnet200d": _bottle(
        S200, 64_693_064, TRICKS, top1=83.25, tag="ra2_in1k at 256 px", **D
    ),
    "wide_resnet50_2": _bottle(
        S50, 68_883_240, WIDE, top1=78.468, tag="tv_in1k", base_width=128
    ),
    "wide_resnet101_2": _bottle(
        S101, 126_886_696, WIDE, top1=78.848, tag="tv_in1k", base_width=128
    ),
    "resnet50_gn": _bottle(
        S50, 25_557_032, GROUP, top1=80.07, tag="a1h_in1k", norm="group"
    ),
    "resnext50_32x4d": _bottle(
        S50, 25_028_904, RESNEXT, top1=77.618, tag="tv_in1k", **_x(32, 4)
    ),
    "resnext50d_32x4d": _bottle(S50, 25_048_136, RESNEXT, **_x(32, 4), **D),
    "resnext101_32x4d": _bottle(
        S101, 44_177_704, RESNEXT, top1=80.34, tag="gluon_in1k", **_x(32, 4)
    ),
    "resnext101_32x8d": _bottle(
        S101, 88_791_336, RESNEXT, top1=79.312, tag="tv_in1k", **_x(32, 8)
    ),
    "resnext101_32x16d": _bottle(S101, 194_026_792, RESNEXT, **_x(32, 16)),
    "resnext101_32x32d": _bottle(S101, 468_530_472, RESNEXT, **_x(32, 32)),
    "resnext101_64x4d": _bottle(
        S101, 83_455_272, RESNEXT, top1=82.45, tag="c1_in1k", **_x(64, 4)
    ),
    "ecaresnet26t": _bottle(S26, 16_011_916, ECA, attention="eca", **T),
    "ecaresnet50d": _bottle(
        S50, 25_576_350, ECA, top1=80.63, tag="miil_in1k", attention="eca", **D
    ),
    "ecaresnet50d_pruned": _bottle(
        S50,
        19_939_713,
        ECA,
        attention="eca",
        pruned_widths=(
            ((47, 18), (52, 22), (64, 35)),
            ((85, 37), (107, 80), (120, 85), (125, 87)),
            ((198, 126), (255, 232), (256, 233), (253, 235), (256, 225), (256, 239)),
            ((492, 237), (512, 500), (512, 490)),
        ),
        pruned_features=(19, 171, 818, 2022),
        **D,
    ),
    "ecaresnet50t": _bottle(S50, 25_573_814, ECA, attention="eca", **T),
    "ecaresnetlight": _bottle(
        (1, 1, 11, 3), 30_162_046, ECA, attention="eca", shortcut_pool=True
    ),
    "ecaresnet101d": _bottle(
        S101, 44_568_563, ECA, top1=82.18, tag="miil_in1k", attention="eca", **D
    ),
    "ecaresnet101d_pruned": _bottle(
        S101,
        24_876_040,
        ECA,
        attention="eca",
        pruned_widths=(
            ((45, 25), (53, 20), (60, 27)),
            ((81, 24), (93, 49), (102, 54), (122, 78)),
            (
                *((101, 25), (239, 160), (234, 156), (250, 176), (253, 191)),
                *((251, 175), (230, 128), (244, 154), (244, 159), (238, 97)),
                *((244, 149), (253, 181), (245, 119), (255, 216), (256, 201)),
                *((253, 149), (254, 141), (256, 190), (256, 217), (255, 156)),
                *((256, 155), (256, 232), (256, 214)),
            ),
            ((499, 289), (512, 512), (512, 502)),
        ),
        pruned_features=(26, 142, 278, 2042),
        **D,
    ),
    "ecaresnet200d": _bottle(S200, 64_693_400, ECA, attention="eca", **D),
    "ecaresnet269d": _bottle(
        S269, 102_093_077, ECA, top1=84.97, tag="at 352 px", attention="eca", **D
    ),
    "ecaresnext26t_32x4d": _bottle(
        S26, 15_406_220, ECA, attention="eca", **_x(32, 4), **T
    ),
    "ecaresnext50t_32x4d": _bottle(
        S50, 25_045_686, ECA, attention="eca", **_x(32, 4), **T
    ),
    "seresnet18": _basic(S26, 11_779_624, SE, attention="se"),
    "seresnet34": _basic(S50, 21_960_416, SE, attention="se"),
    "seresnet50": _bottle(
        S50, 28_088_024, SE, top1=80.26, tag="ra2_in1k", attention="se"
    ),
    "seresnet50t": _bottle(S50, 28_104_720, SE, attention="se", **T),
    "seresnet101": _bottle(S101, 49_326_872, SE, attention="se"),
    "seresnet152": _bottle(S152, 66_821_848, SE, attention="se"),
    "seresnet152d": _bottle(S152, 66_841_080, SE, attention="se", **D),
    "seresnet200d": _bottle(S200, 71_855_096, SE, attention="se", **D),
    "seresnet269d": _bottle(S269, 113_672_760, SE, attention="se", **D),
    "seresnext26d_32x4d": _bottle(
        S26, 16_809_512, SE, attention="se", **_x(32, 4), **D
    ),
    "seresnext26t_32x4d": _bottle(
        S26, 16_806_976, SE, attention="se", **_x(32, 4), **T
    ),
    "seresnext50_32x4d": _bottle(
        S50, 27_559_896, SE, top1=81.27, tag="racm_in1k", attention="se", **_x(32, 4)
    ),
    "seresnext101_32x4d": _bottle(S101, 48_955_416, SE, attention="se", **_x(32, 4)),
    "seresnext101_32x8d": _bottle(S101, 93_569_048, SE, attention="se", **_x(32, 8)),
    "seresnext101d_32x8d": _bottle(
        S101, 93_588_280, SE, attention="se", **_x(32, 8), **D
    ),
    "seresnext101_64x4d": _bottle(S101, 88_232_984, SE, attention="se", **_x(64, 4)),
    "senet154": _bottle(
        S152,
        115_088_984,
        SE,
        top1=81.26,
        tag="gluon_in1k",
        attention="se",
        stem=STEM_S,
        shortcut_kernel=3,
        reduce_first=2,
        **_x(64, 4),
    ),
    "resnetblur18": _basic(S26, 11_689_512, BLUR, anti_alias="blur"),
    "resnetblur50": _bottle(
        S50, 25_557_032, BLUR, top1=79.31, tag="bt_in1k", anti_alias="blur"
    ),
    "resnetblur50d": _bottle(S50, 25_576_264, BLUR, anti_alias="blur", **D),
    "resnetblur101d": _bottle(S101, 44_568_392, BLUR, anti_alias="blur", **D),
    "resnetaa34d": _basic(S50, 21_816_904, ASSEMBLED, anti_alias="avg", **D),
    "resnetaa50": _bottle(
        S50, 25_557_032, ASSEMBLED, top1=80.61, tag="a1h_in1k", anti_alias="avg"
    ),
    "resnetaa50d": _bottle(S50, 25_576_264, ASSEMBLED, anti_alias="avg", **D),
    "resnetaa101d": _bottle(S101, 44_568_392, ASSEMBLED, anti_alias="avg", **D),
    "seresnetaa50d": _bottle(
        S50, 28_107_256, ASSEMBLED, anti_alias="avg", attention="se", **D
    ),
    "seresnextaa101d_32x8d": _bottle(
        S101, 93_588_280, ASSEMBLED, anti_alias="avg", attention="se", **_x(32, 8), **D
    ),
    "seresnextaa201d_32x8d": _bottle(
        (3, 24, 36, 4),
        149_394_904,
        ASSEMBLED,
        anti_alias="avg",
        attention="se",
        **_x(32, 8),
        **E,
    ),
    "resnetrs50": _rs(S50, 35_691_912, 79.93, 224),
    "resnetrs101": _rs(S101, 63_618_696, 82.29, 288),
    "resnetrs152": _rs(S152, 86_621_576, 83.71, 320),
    "resnetrs200": _rs(S200, 93_209_992, 84.45, 320),
    "resnetrs270": _rs((4, 29, 53, 4), 129_861_448, 84.44, 352),
    "resnetrs350": _rs((4, 36, 72, 4), 163_956_168, 84.71, 384),
    "resnetrs420": _rs((4, 44, 87, 4), 191_891_656, 85.01, 416),
    "test_resnet": _timm(
        ("basic", "basic", "bottleneck", "basic"),
        S14,
        469_688,
        TIMM,
        widths=(32, 48, 48, 96),
        stem=((3, 2, 16), (3, 1, 16), (3, 1, 32)),
        shortcut_pool=True,
    ),
    # timm/models/resnetv2.py.
    "resnetv2_50x1_bit": _bit(S50, 25_549_352, 1, 80.39, 448),
    "resnetv2_50x3_bit": _bit(S50, 217_319_080, 3, 83.98, 448),
    "resnetv2_101x1_bit": _bit(S101, 44_541_480, 1, 82.33, 448),
    "resnetv2_101x3_bit": _bit(S101, 387_934_888, 3, 84.43, 448),
    "resnetv2_152x2_bit": _bit(S152, 236_335_208, 2, 84.47, 448),
    "resnetv2_152x4_bit": _bit(S152, 936_533_224, 4, 84.94, 480),
    "resnetv2_18": _timm_v2(
        "preact_basic", S26, 11_687_720, top1=73.57, tag="ra4_e3600_r224"
    ),
    "resnetv2_18d": _timm_v2("preact_basic", S26, 11_706_952, **D),
    "resnetv2_34": _timm_v2(
        "preact_basic", S50, 21_795_880, top1=77.63, tag="ra4_e3600_r224"
    ),
    "resnetv2_34d": _timm_v2("preact_basic", S50, 21_815_112, **D),
    "resnetv2_50": _timm_v2(
        "preact_bottleneck", S50, 25_549_352, top1=80.41, tag="a1h_in1k"
    ),
    "resnetv2_50d": _timm_v2("preact_bottleneck", S50, 25_568_584, **D),
    "resnetv2_50t": _timm_v2("preact_bottleneck", S50, 25_566_048, **T),
    "resnetv2_101": _timm_v2(
        "preact_bottleneck", S101, 44_541_480, top1=82.04, tag="a1h_in1k"
    ),
    "resnetv2_101d": _timm_v2("preact_bottleneck", S101, 44_560_712, **D),
    "resnetv2_152": _timm_v2("preact_bottleneck", S152, 60_185_128),
    "resnetv2_152d": _timm_v2("preact_bottleneck", S152, 60_204_360, **D),
    "resnetv2_50d_gn": _timm_v2(
        "preact_bottleneck", S50, 25_568_584, GROUP, norm="group", **D
    ),
    "resnetv2_50d_evos": _timm_v2(
        "preact_bottleneck", S50, 25_591_368, EVONORM, norm="evonorm_s0", **D
    ),
    "resnetv2_50d_frn": _timm_v2(
        "preact_bottleneck", S50, 25_591_368, FRN, norm="filter_response", **D
    ),
    # timm/models/sknet.py, resnest.py, res2net.py.
    "skresnet18": _sk("basic", S26, 11_958_056, 73.02),
    "skresnet34": _sk("basic", S50, 22_282_376, 76.96),
    "skresnet50": _sk("bottleneck", S50, 25_803_160),
    "skresnet50d": _sk("bottleneck", S50, 25_822_392, **D),
    "skresnext50_32x4d": _sk(
        "bottleneck",
        S50,
        27_479_784,
        80.17,
        sk_split=False,
        sk_divisor=32,
        **_x(32, 4),
    ),
    "resnest14d": _resnest(S14, 10_611_688),
    "resnest26d": _resnest(S26, 17_069_448),
    "resnest50d": _resnest(S50, 27_483_240, 81.03),
    "resnest101e": _resnest(S101, 48_275_016, 82.83, 256, stem=STEM_S),
    "resnest200e": _resnest(S200, 70_201_544, 83.84, 320, stem=STEM_S),
    "resnest269e": _resnest(S269, 110_929_480, 84.54, 416, stem=STEM_S),
    "resnest50d_4s2x40d": _resnest(
        S50, 30_417_592, radix=4, downsample_first=True, **_x(2, 40)
    ),
    "resnest50d_1s4x24d": _resnest(
        S50, 25_677_000, radix=1, downsample_first=True, **_x(4, 24)
    ),
    "res2net50_26w_4s": _res2net(S50, 25_699_120, 26, 4, 77.99),
    "res2net101_26w_4s": _res2net(S101, 45_206_688, 26, 4, 79.19),
    "res2net50_26w_6s": _res2net(S50, 37_051_448, 26, 6),
    "res2net50_26w_8s": _res2net(S50, 48_403_776, 26, 8, 79.20),
    "res2net50_48w_2s": _res2net(S50, 25_287_304, 48, 2),
    "res2net50_14w_8s": _res2net(S50, 25_059_816, 14, 8, 78.14),
    "res2next50": _res2net(S50, 24_671_464, 4, 4, groups=8),
    "res2net50d": _res2net(S50, 25_718_352, 26, 4, 80.27, **D),
    "res2net101d": _res2net(S101, 45_225_920, 26, 4, **D),
    # timm/models/nfnet.py; dm_* are DeepMind's, the others timm's variants of them.
    "nf_resnet50": _norm_free(S50, 25_557_032, NF_RESNET),
    "dm_nfnet_f0": _nfnet(1, 71_489_284, 83.6),
    "dm_nfnet_f1": _nfnet(2, 132_634_256, 84.7),
    "dm_nfnet_f2": _nfnet(3, 193_779_228, 85.1),
    "dm_nfnet_f3": _nfnet(4, 254_924_200, 85.7),
    "dm_nfnet_f4": _nfnet(5, 316_069_172, 85.9),
    "dm_nfnet_f5": _nfnet(6, 377_214_144, 86.0),
    "dm_nfnet_f6": _nfnet(7, 438_359_116, 86.5),
    "nfnet_f0": _nfnet(1, 71_489_272),
    "nfnet_f1": _nfnet(2, 132_634_232),
    "nfnet_f2": _nfnet(3, 193_779_192),
    "nfnet_f3": _nfnet(4, 254_924_152),
    "nfnet_f4": _nfnet(5, 316_069_112),
    "nfnet_f5": _nfnet(6, 377_214_072),
    "nfnet_f6": _nfnet(7, 438_359_032),
    # He et al. 2015 as published: the stride on a block's first 1x1.
    "resnet50_v1": _v1(_bottle(S50, 25_557_032)),
    "resnet101_v1": _v1(_bottle(S101, 44_549_160)),
    "resnet152_v1": _v1(_bottle(S152, 60_192_808)),
    "resnet200_v1": _v1(_bottle(S200, 64_673_832)),
    # keras.applications.
    "keras_resnet50": _keras(S50, 25_583_592, 74.9),
    "keras_resnet101": _keras(S101, 44_601_832, 76.4),
    "keras_resnet152": _keras(S152, 60_268_520, 76.6),
    "keras_resnet50v2": _keras_v2(S50, 25_568_360, 76.0),
    "keras_resnet101v2": _keras_v2(S101, 44_577_896, 77.2),
    "keras_resnet152v2": _keras_v2(S152, 60_236_904, 78.0),
    # He et al. 2015, section 4.2: CIFAR. The zero channels of the shortcuts are at the
    # end (`cifar_`), or on both sides (`akamaster_`).
    "cifar_resnet20": _cifar(20, 269_722, 91.25),
    "cifar_resnet32": _cifar(32, 464_154, 92.49),
    "cifar_resnet44": _cifar(44, 658_586, 92.83),
    "cifar_resnet56": _cifar(56, 853_018, 93.03),
    "cifar_resnet110": _cifar(110, 1_727_962, 93.57),
    "cifar_resnet1202": _cifar(1202, 19_421_274, 92.07),
    "akamaster_resnet20": _akamaster(20, 269_722, 91.73),
    "akamaster_resnet32": _akamaster(32, 464_154, 92.63),
    "akamaster_resnet44": _akamaster(44, 658_586, 93.10),
    "akamaster_resnet56": _akamaster(56, 853_018, 93.39),
    "akamaster_resnet110": _akamaster(110, 1_727_962, 93.68),
    "akamaster_resnet1202": _akamaster(1202, 19_421_274, 93.82),
    "stochastic_depth110": _stochastic_depth(110, 1_727_962, 94.77),
    "stochastic_depth1202": _stochastic_depth(1202, 19_421_274, 95.09),
    # Pre-activation and wide networks for CIFAR.
    "preact110": _preact_cifar("preact_basic", 18, 1_727_962, 93.63, shortcut="pad"),
    "preact164": _preact_cifar(
        "preact_bottleneck", 18, 1_703_258, 94.54, stride_at="1x1"
    ),
    "preact1001": _preact_cifar(
        "preact_bottleneck", 111, 10_327_706, 95.08, stride_at="1x1"
    ),
    "wrn16_4": _wide(16, 4, 2_748_890),
    "wrn16_8": _wide(16, 8, 10_961_370),
    "wrn16_10": _wide(16, 10, 17_116_634),
    "wrn22_8": _wide(22, 8, 17_158_106),
    "wrn28_2": _wide(28, 2, 1_467_610),
    "wrn28_10": _wide(28, 10, 36_479_194, 96.00),
    "wrn40_1": _wide(40, 1, 563_930),
    "wrn40_2": _wide(40, 2, 2_243_546),
    "wrn40_4": _wide(40, 4, 8_949_210),
    "wrn40_8": _wide(40, 8, 35_748_314),
    "wrn40_10": _wide(40, 10, 55_841_754),
    "resnext29_8x64d": _resnext_cifar(8, 34_426_698, 96.35),
    "resnext29_16x64d": _resnext_cifar(16, 68_155_210, 96.42),
    # The baselines that residual networks are compared with.
    "plain18": _plain(_basic(S26, 0), 11_515_688),
    "plain34": _plain(_basic(S50, 0), 21_623_848),
    "plain20": _plain(_cifar(20, 0), 269_722),
    "plain32": _plain(_cifar(32, 0), 464_154),
    "plain44": _plain(_cifar(44, 0), 658_586),
    "plain56": _plain(_cifar(56, 0), 853_018),
    "vgg19": Entry(
        VGGSpec(),
        143_667_240,
        VGG_PAPER,
        "torchvision",
        "vgg",
        72.376,
        "torchvision, IMAGENET1K_V1",
    ),
    "vgg19_bn": Entry(
        VGGSpec(batch_norm=True),
        143_678_248,
        VGG_PAPER,
        "torchvision",
        "vgg",
        74.218,
        "torchvision, IMAGENET1K_V1",
    ),
    # The plan of FitNet 4, whose sum of parameters is the paper's 2.3 M; the thin one's
    # widths are those that give its 1.25 M in three stages of ten layers.
    "highway19": Entry(
        HighwaySpec(widths=((32,) * 3 + (48,) * 2, (80,) * 6, (128,) * 6)),
        2_274_186,
        HIGHWAY,
        "torch",
        "highway",
        92.46,
        "the paper, CIFAR-10",
    ),
    "highway32": Entry(
        HighwaySpec(widths=((32,) * 10, (48,) * 10, (64,) * 10)),
        1_248_410,
        HIGHWAY,
        "torch",
        "highway",
        91.20,
        "the paper, CIFAR-10",
    ),
    # The networks of two tutorials: Keras style for 64x64 pictures of hand signs, and
    # torch from scratch.
    "tutorial_keras_resnet50": Entry(
        ResNetSpec(
            block="bottleneck",
            stage_sizes=S50,
            stride_at="1x1",
            stem_pool="max_valid",
            biased=("stem", "conv1", "conv2", "conv3", "shortcut"),
            norm_epsilon=1e-3,
            conv_init="glorot_uniform",
            head_pool=2,
            num_classes=6,
            **KERAS_NORM,
        ),
        23_546_886,
        RESNET,
        "keras",
        "keras_tutorial",
    ),
    "tutorial_torch_resnet50": _tutorial_torch(_bottle(S50, 25_557_032)),
    "tutorial_torch_resnet101": _tutorial_torch(_bottle(S101, 44_549_160)),
    "tutorial_torch_resnet152": _tutorial_torch(_bottle(S152, 60_192_808)),
}
# torchvision's own networks are the same functions with other initial values.
ZOO |= {
    f"torchvision_{name}": _torchvision(ZOO[name], top1)
    for name, top1 in {
        "resnet18": 69.758,
        "resnet34": 73.314,
        "resnet50": 76.130,
        "resnet101": 77.374,
        "resnet152": 78.312,
        "resnext50_32x4d": 77.618,
        "resnext101_32x8d": 79.312,
        "resnext101_64x4d": 83.246,
        "wide_resnet50_2": 78.468,
        "wide_resnet101_2": 78.848,
    }.items()
}

# timm's deprecated names, with their new name and the tag of their weights. All
# ig_resnext101_* map to 32x8d, as they do in timm.
ALIASES = {
    **{f"tv_resnet{n}": f"resnet{n}.tv_in1k" for n in (34, 50, 101, 152)},
    "tv_resnext50_32x4d": "resnext50_32x4d.tv_in1k",
    **{
        f"ig_resnext101_32x{n}d": "resnext101_32x8d.fb_wsl_ig1b_ft_in1k"
        for n in (8, 16, 32, 48)
    },
    **{
        f"{method}_{name}": f"{name}.fb_{method}_{data}_ft_in1k"
        for method, data in (("ssl", "yfcc100m"), ("swsl", "ig1b"))
        for name in (
            *("resnet18", "resnet50", "resnext50_32x4d"),
            *(f"resnext101_32x{n}d" for n in (4, 8, 16)),
        )
    },
    **{f"gluon_resnet{n}_v1b": f"resnet{n}.gluon_in1k" for n in (18, 34)},
    **{
        f"gluon_resnet{n}_v1{kind}": f"resnet{n}{kind.strip('b')}.gluon_in1k"
        for n in (50, 101, 152)
        for kind in "bcds"
    },
    **{
        f"gluon_{name}": f"{name}.gluon_in1k"
        for name in (
            *("resnext50_32x4d", "resnext101_32x4d", "resnext101_64x4d"),
            *("seresnext50_32x4d", "seresnext101_32x4d", "seresnext101_64x4d"),
            "senet154",
        )
    },
    "seresnext26tn_32x4d": "seresnext26t_32x4d",
    **{
        f"resnetv2_{name}_bitm{suffix}": f"resnetv2_{name}_bit.goog_in21k{tag_end}"
        for name in ("50x1", "50x3", "101x1", "101x3", "152x2", "152x4")
        for suffix, tag_end in (("", "_ft_in1k"), ("_in21k", ""))
    },
    "resnetv2_50x1_bit_distilled": "resnetv2_50x1_bit.goog_distilled_in1k",
    **{
        f"resnetv2_152x2_bit_teacher{size}": (
            f"resnetv2_152x2_bit.goog_teacher_in21k_ft_in1k{size}"
        )
        for size in ("", "_384")
    },
}


def list_models(pattern: str = "*") -> list[str]:
    """Lists the names of networks.

    Args:
      pattern: A shell-style pattern that the names match.

    Returns:
      The names in the order of the zoo; an empty list if none matches.

    Examples:
      >>> resnet_jax.list_models("cifar_resnet1*")
      ['cifar_resnet110', 'cifar_resnet1202']
    """
    return fnmatch.filter(ZOO, pattern)


def resolve(name: str) -> str:
    """Returns a network's name in the zoo, given any of its names.

    Args:
      name: A name of the zoo, or timm's name with a tag of weights, or one of timm's
        deprecated names, of which a warning is logged.

    Raises:
      UserError: There is no such network; the message names the nearest ones.

    Examples:
      >>> resolve("resnet50.a1_in1k")
      'resnet50'
    """
    if not isinstance(name, str):
        raise BadValueError(f"The name of a network is a string, not {name!r}.")
    if name in ALIASES:
        log.warning("%s is a deprecated name of %s.", name, ALIASES[name])
        name = ALIASES[name]
    known_name, _, _ = name.partition(".")
    check_known(f"network {name!r}", known_name, ZOO)
    return known_name


def get_entry(name: str) -> Entry:
    """Returns a network's row of the zoo.

    Args:
      name: A name of `list_models`, or one that timm gives the network.

    Raises:
      UserError: There is no such network; the message names the nearest ones.

    Examples:
      >>> resnet_jax.models.get_entry("resnet50").params
      25557032
    """
    return ZOO[resolve(name)]


def get_spec(name: str, /, **overrides: Any) -> Spec:
    """Returns a network's spec with some fields replaced.

    Args:
      name: A name of `list_models`, or one that timm gives the network.
      **overrides: Fields of the spec to replace.

    Raises:
      UserError: There is no such network or field, or the network cannot have such a
        value. The message names the nearest ones.

    Examples:
      >>> resnet_jax.models.get_spec("resnet50", output_stride=8).stage_sizes
      (3, 4, 6, 3)
    """
    spec = get_entry(name).spec
    fields = [field.name for field in dataclasses.fields(spec)]
    for key in overrides:
        if key not in fields:
            raise UserError(
                f"The spec of {name} has no field {key!r}.{nearest(key, fields)}"
            )
    try:
        return dataclasses.replace(spec, **overrides)
    except BadValueError as error:
        raise BadValueError(f"{name}: {error}") from None


def build(
    spec: Spec,
    *,
    dtype: DTypeLike = "float32",
    bn_group_size: int | None = None,
    scan_blocks: bool = False,
) -> nn.Module:
    """Returns the module of a spec.

    Args:
      spec: The network.
      dtype: The type of the computation; parameters and statistics are float32.
      bn_group_size: The ghost batch size in examples. None: the whole batch.
      scan_blocks: Merges consecutive residual blocks of equal shape into one scan,
        which compiles faster and stacks their parameters.

    Returns:
      The Flax module. It maps normalised images [b, h, w, c] to float32 logits.

    Examples:
      >>> from resnet_jax import models
      >>> spec = models.get_spec("resnet18", num_classes=10)
      >>> models.build(spec) == resnet_jax.create_model("resnet18", num_classes=10)
      True
    """
    if isinstance(spec, VGGSpec):
        return VGG(spec, dtype, bn_group_size)
    if isinstance(spec, HighwaySpec):
        return Highway(spec, dtype, bn_group_size)
    return ResNet(spec, dtype, bn_group_size, scan_blocks)


def create_model(
    name: str,
    /,
    *,
    dtype: DTypeLike = "float32",
    bn_group_size: int | None = None,
    scan_blocks: bool = False,
    **overrides: Any,
) -> nn.Module:
    """Creates a network of the zoo.

    Args:
      name: A name of `list_models`, or one that timm gives the network.
      dtype: The type of the computation; parameters and statistics are float32.
      bn_group_size: The ghost batch size in examples. None: the whole batch.
      scan_blocks: Merges consecutive residual blocks of equal shape into one scan,
        which compiles faster and stacks their parameters.
      **overrides: Fields of the network's spec to replace, such as `num_classes=10`.

    Returns:
      The Flax module. It maps normalised images [b, h, w, c] to float32 logits.

    Raises:
      UserError: There is no such network or field, or the network cannot have such a
        value. The message names the nearest ones.

    Examples:
      >>> module = resnet_jax.create_model("cifar_resnet20", num_classes=7)
      >>> x = jax.numpy.zeros((2, 32, 32, 3))
      >>> variables = module.init(jax.random.key(0), x)
      >>> module.apply(variables, x).shape
      (2, 7)
      >>> list(module.apply(variables, x, features=True))
      ['C1', 'C2', 'C3', 'C4']
    """
    if "pretrained" in overrides:
        raise BadValueError(
            "create_model has no argument 'pretrained', since it makes networks without"
            " trained weights. resnet_jax.load('timm:NAME.TAG') loads one with the"
            " weights of the Hugging Face hub."
        )
    return build(
        get_spec(name, **overrides),
        dtype=dtype,
        bn_group_size=bn_group_size,
        scan_blocks=scan_blocks,
    )
