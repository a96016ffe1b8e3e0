"""Evaluation sets by name: what each is in tfds, and how its paper counts.

imagenet_v2: new photographs collected as ImageNet's were (Recht et al. 2019,
  arXiv:1902.10811); `matched-frequency`, or `imagenet_v2/threshold-0.7`, `/topimages`.
imagenet_a: photographs that ResNet-50 got wrong, of 200 classes, among which alone a
  prediction is chosen (Hendrycks et al. 2019, arXiv:1907.07174, and their `eval.py`).
imagenet_r: renditions of 200 classes, counted likewise (Hendrycks et al. 2020,
  arXiv:2006.16241).
imagenet_sketch: sketches (Wang et al. 2019, arXiv:1905.13549).
imagenet2012_real: ImageNet's validation images with new labels, any number each; a
  prediction is right if it is among them, and the 3,163 of 50,000 images without a
  label do not count (Beyer et al. 2020, arXiv:2006.07159). At most nine labels each, in
  the authors' `real.json`.
imagenet2012_corrupted: 15 corruptions in 5 severities of ImageNet's validation images,
  which are 224 x 224 and not cropped any more (Hendrycks & Dietterich 2019,
  arXiv:1903.12261). Figures are means over all 75; `mce` is the mean over corruptions
  of the error divided by AlexNet's. `imagenet2012_corrupted/fog` is one corruption,
  `imagenet2012_corrupted/fog_3` one severity of it.
cifar10_corrupted: the same of CIFAR-10's test images, without `mce`.

Any other source is written `SOURCE@SPLIT`, as in `folder:/data/pets@val`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

from resnet_jax.data.loader import Examples
from resnet_jax.data.sources import (
    NamedSource,
    Relabelled,
    label_of,
    open_source,
    split_of,
    with_classes,
)
from resnet_jax.data.tfds_source import TfdsSource
from resnet_jax.errors import UserError, nearest

# AlexNet's top-1 errors, means over five severities, with all digits as in
# github.com/google-research/augmix, imagenet.py (arXiv:1912.02781, whose first authors
# include that of ImageNet-C), which took them from github.com/hendrycks/robustness.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
# tfds has other names for two of them here.
CIFAR10_CORRUPTIONS = [
    {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"}.get(name, name)
    for name in ALEXNET_ERRORS
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What an evaluation set is.

    Attributes:
      split: of the tfds data set of the same name.
      configs: of that data set, all of which are evaluated; (): it has none.
      most_labels: that an image has; 0: each has exactly one.
      occurring_only: whether only classes that occur in the set can be predicted.
      cropped: whether images are resized to the network's size and not cropped.
      classes: names of the classes where tfds only numbers them.
      reference_errors: by which the errors of the configs are divided.
    """

    split: str = "test"
    configs: tuple[str, ...] = ()
    most_labels: int = 0
    occurring_only: bool = False
    cropped: bool = False
    classes: tuple[str, ...] = ()
    reference_errors: Mapping[str, float] = dataclasses.field(default_factory=dict)


def _severities(corruptions: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name}_{k}" for name in corruptions for k in range(1, 6))


SETS = {
    "imagenet_v2": Row(configs=("matched-frequency",)),
    "imagenet_a": Row(occurring_only=True),
    "imagenet_r": Row(occurring_only=True),
    "imagenet_sketch": Row(),
    "imagenet2012_real": Row(split="validation", most_labels=9),
    "imagenet2012_corrupted": Row(
        split="validation",
        configs=_severities(ALEXNET_ERRORS),
        cropped=True,
        reference_errors=ALEXNET_ERRORS,
    ),
    "cifar10_corrupted": Row(
        configs=_severities(CIFAR10_CORRUPTIONS),
        cropped=True,
        # In the order of the labels, from CIFAR-10's batches.meta.
        classes=(
            *("airplane", "automobile", "bird", "cat", "deer"),
            *("dog", "frog", "horse", "ship", "truck"),
        ),
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluationSet:
    """An evaluation set that is open.

    Attributes:
      parts: its examples, by tfds config; {"": examples} where there are none.
      occurring_only: whether only classes that occur in the set can be predicted.
      reference_errors: see `Row`.
    """

    parts: dict[str, Examples]
    occurring_only: bool
    reference_errors: Mapping[str, float]

    def __len__(self) -> int:
        return sum(len(examples.source) for examples in self.parts.values())

    @functools.cached_property
    def labels(self) -> frozenset[int] | None:
        """The labels that can be predicted; None: all. Reads the whole set."""
        if not self.occurring_only:
            return None
        return frozenset(
            label_of(examples.source, index)
            for examples in self.parts.values()
            for index in range(len(examples.source))
        )


def open_set(
    name: str,
    classes: Sequence[str],
    *,
    data_dir: str,
    examples_of: Callable[[NamedSource, bool, int], Examples],
) -> EvaluationSet:
    """Opens an evaluation set.

    Args:
      name: a key of `SETS`, perhaps with `/CONFIG`, or `SOURCE@SPLIT`.
      classes: of the network; labels become their numbers.
      data_dir: where tfds keeps its data sets.
      examples_of: makes examples of a source, of whether it is cropped already, and of
        the most labels of an image.

    Raises:
      UserError: an unknown set, one that is not prepared, or other classes.
    """
    key, _, config = name.partition("/")
    if key not in SETS:
        source, split = split_of(name)
        if not split:
            raise UserError(
                f"There is no evaluation set {name!r}.{nearest(key, SETS)} Any other is"
                " written SOURCE@SPLIT, as in folder:/data/pets@val."
            )
        source = with_classes(open_source(source, split, data_dir=data_dir), classes)
        return EvaluationSet({"": examples_of(source, False, 0)}, False, {})
    row = SETS[key]
    configs = row.configs
    if config:
        severities = [known for known in configs if known.startswith(f"{config}_")]
        configs = tuple(severities) or (config,)
    parts = {}
    for config in configs or ("",):
        dataset = f"{key}/{config}" if config else key
        source = TfdsSource(dataset, row.split, data_dir, row.most_labels)
        if row.classes:
            numbers = tuple(range(len(row.classes)))
            source = Relabelled(source, row.classes, numbers)
        source = with_classes(source, classes)
        parts[config] = examples_of(source, row.cropped, row.most_labels)
    return EvaluationSet(parts, row.occurring_only, row.reference_errors)


def summarize(opened: EvaluationSet, results: Mapping[str, dict]) -> dict:
    """One result of those of all configs.

    Returns:
      means of `top1`, `top5` and `loss` over the configs, sums of `n_seen` and
      `bad_images`; if there are several configs, `top1` of each corruption, and `mce`
      if all of those are there that it is made of.
    """
    means = {
        key: sum(result[key] for result in results.values()) / len(results)
        for key in ("top1", "top5", "loss")
    }
    sums = {
        key: sum(result[key] for result in results.values())
        for key in ("n_seen", "bad_images")
    }
    whole = means | sums
    if len(results) == 1:
        return whole
    by_corruption: dict[str, list[float]] = {}
    for config, result in results.items():
        by_corruption.setdefault(config.rpartition("_")[0], []).append(result["top1"])
    whole["top1_of"] = {
        name: sum(values) / len(values) for name, values in by_corruption.items()
    }
    reference = opened.reference_errors
    if reference and whole["top1_of"].keys() == reference.keys():
        errors = [(1 - whole["top1_of"][name]) / reference[name] for name in reference]
        whole["mce"] = sum(errors) / len(errors)
    return whole
