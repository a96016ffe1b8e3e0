"""The table of networks: name -> spec, parameters, paper. The only list of variants."""

import dataclasses
import fnmatch

from resnet_jax.errors import UserError, nearest
from resnet_jax.models.resnet import ResNet
from resnet_jax.models.spec import ResNetSpec


@dataclasses.dataclass(frozen=True)
class Entry:
    """One network of the zoo.

    Attributes:
      spec: the network.
      params: its exact number of parameters (running statistics not counted).
      paper: where it was published.
    """

    spec: ResNetSpec
    params: int
    paper: str = "He et al. 2015, arXiv:1512.03385"


def _imagenet(block: str, sizes: tuple[int, ...], params: int, **fields) -> Entry:
    return Entry(ResNetSpec(block=block, stage_sizes=sizes, **fields), params)


def _cifar(depth: int, params: int) -> Entry:
    # Section 4.2 of the paper: depth = 6 n + 2.
    n = (depth - 2) // 6
    spec = ResNetSpec(
        block="basic",
        stage_sizes=(n, n, n),
        widths=(16, 32, 64),
        stem="cifar",
        stem_width=16,
        shortcut="pad",
        num_classes=10,
    )
    return Entry(spec, params)


ZOO: dict[str, Entry] = {
    "resnet18": _imagenet("basic", (2, 2, 2, 2), 11_689_512),
    "resnet34": _imagenet("basic", (3, 4, 6, 3), 21_797_672),
    "resnet50": _imagenet("bottleneck", (3, 4, 6, 3), 25_557_032),
    "resnet101": _imagenet("bottleneck", (3, 4, 23, 3), 44_549_160),
    "resnet152": _imagenet("bottleneck", (3, 8, 36, 3), 60_192_808),
    "resnet200": _imagenet("bottleneck", (3, 24, 36, 3), 64_673_832),
    "resnet50_v1": _imagenet("bottleneck", (3, 4, 6, 3), 25_557_032, stride_at="1x1"),
    "resnet101_v1": _imagenet("bottleneck", (3, 4, 23, 3), 44_549_160, stride_at="1x1"),
    "resnet152_v1": _imagenet("bottleneck", (3, 8, 36, 3), 60_192_808, stride_at="1x1"),
    "resnet200_v1": _imagenet(
        "bottleneck", (3, 24, 36, 3), 64_673_832, stride_at="1x1"
    ),
    "cifar_resnet20": _cifar(20, 269_722),
    "cifar_resnet32": _cifar(32, 464_154),
    "cifar_resnet44": _cifar(44, 658_586),
    "cifar_resnet56": _cifar(56, 853_018),
    "cifar_resnet110": _cifar(110, 1_727_962),
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell-style pattern, in the zoo's order."""
    return fnmatch.filter(ZOO, pattern)


def get_spec(name: str, **overrides) -> ResNetSpec:
    """Returns a network's spec with some fields replaced.

    Args:
      name: a name of the zoo; else raises UserError with the nearest names.
      **overrides: fields of `ResNetSpec`; an unknown field or a value that is not
        allowed raises UserError.
    """
    if name not in ZOO:
        raise UserError(f"There is no network {name!r}.{nearest(name, ZOO)}")
    fields = [field.name for field in dataclasses.fields(ResNetSpec)]
    for key in overrides:
        if key not in fields:
            raise UserError(f"A spec has no field {key!r}.{nearest(key, fields)}")
    try:
        return dataclasses.replace(ZOO[name].spec, **overrides)
    except ValueError as error:
        raise UserError(f"{name}: {error}.") from None


def create_model(name: str, *, dtype="float32", bn_group_size=None, **overrides):
    """Returns the `ResNet` of that name.

    Args:
      name: a name of the zoo; else raises UserError with the nearest names.
      dtype: type of the computation.
      bn_group_size: examples that share batch-norm statistics; None: the whole batch.
      **overrides: fields of the spec to replace, such as `num_classes=10`.
    """
    return ResNet(get_spec(name, **overrides), dtype, bn_group_size)
