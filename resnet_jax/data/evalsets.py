"""Evaluation sets by name: their data sets in tfds, and the metrics of their papers.

imagenet_v2: New photographs collected as ImageNet's were (Recht et al. 2019,
  arXiv:1902.10811). The config is `matched-frequency`; others are
  `imagenet_v2/threshold-0.7` and `imagenet_v2/topimages`.
imagenet_a: Photographs of 200 classes that ResNet-50 got wrong. Predictions are chosen
  among these classes alone (Hendrycks et al. 2019, arXiv:1907.07174, and their
  `eval.py`).
imagenet_r: Renditions of 200 classes, with predictions chosen among these classes
  (Hendrycks et al. 2020, arXiv:2006.16241).
imagenet_sketch: Sketches (Wang et al. 2019, arXiv:1905.13549).
imagenet2012_real: ImageNet's validation images with new labels, any number per image. A
  prediction is right if it is one of them, and the 3,163 of 50,000 images without a
  label do not count (Beyer et al. 2020, arXiv:2006.07159). In the authors' `real.json`,
  images have at most nine labels.
imagenet2012_corrupted: 15 corruptions in 5 severities of ImageNet's validation images,
  which are 224 x 224 and are not cropped again (Hendrycks & Dietterich 2019,
  arXiv:1903.12261). Figures are means over all 75; `mce` is the mean over corruptions
  of the error divided by AlexNet's. `imagenet2012_corrupted/fog` is one corruption,
  `imagenet2012_corrupted/fog_3` one severity of it.
cifar10_corrupted: The same for CIFAR-10's test images, without `mce`.

Any other source is written `SOURCE@SPLIT`, as in `folder:/data/pets@val`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

from resnet_jax.data.derived_sources import Relabelled, label_of, with_classes
from resnet_jax.data.loader import Examples
from resnet_jax.data.source_protocol import NamedSource
from resnet_jax.data.sources import open_source, split_of
from resnet_jax.data.tfds_source import TfdsSource
from resnet_jax.errors import UserError, nearest

# AlexNet's top-1 errors, means over five severities, with all digits as in
# github.com/google-research/augmix, imagenet.py (arXiv:1912.02781, whose first authors
# include that of ImageNet-C), which has them from github.com/hendrycks/robustness.
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
# In CIFAR-10-C, tfds has other names for two of the corruptions.
CIFAR10_CORRUPTIONS = [
    {"glass_blur": "frosted_glass_blur", "elastic_transform": "elastic"}.get(name, name)
    for name in ALEXNET_ERRORS
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetSpec:
    """The description of an evaluation set.

    Attributes:
      split: The split of the tfds data set of the same name.
      configs: The configs of that data set, all of which are evaluated; () if it has
        none.
      most_labels: The largest number of labels of an image; 0 if each image has exactly
        one.
      occurring_only: True if only classes that occur in the set can be predicted.
      cropped: True if images are resized to the network's size and not cropped.
      classes: The names of the classes where tfds only numbers them.
      reference_errors: The errors by which those of the corruptions are divided.
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


SETS: Mapping[str, SetSpec] = {
    "imagenet_v2": SetSpec(configs=("matched-frequency",)),
    "imagenet_a": SetSpec(occurring_only=True),
    "imagenet_r": SetSpec(occurring_only=True),
    "imagenet_sketch": SetSpec(),
    "imagenet2012_real": SetSpec(split="validation", most_labels=9),
    "imagenet2012_corrupted": SetSpec(
        split="validation",
        configs=_severities(ALEXNET_ERRORS),
        cropped=True,
        reference_errors=ALEXNET_ERRORS,
    ),
    "cifar10_corrupted": SetSpec(
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
      parts: The examples of each tfds config; {"": examples} for a set without configs.
      occurring_only: True if only classes that occur in the set can be predicted.
      reference_errors: The errors by which those of the corruptions are divided.
    """

    parts: dict[str, Examples]
    occurring_only: bool
    reference_errors: Mapping[str, float]

    def __len__(self) -> int:
        return sum(len(examples.source) for examples in self.parts.values())

    @functools.cached_property
    def labels(self) -> frozenset[int] | None:
        """The labels that can be predicted, or None for all; reads the whole set."""
        if not self.occurring_only:
            return None
        return frozenset(
            int(label_of(examples.source, index))
            for examples in self.parts.values()
            for index in range(len(examples.source))
        )


def open_set(
    name: str,
    classes: Sequence[str],
    *,
    data_dir: str,
    make_examples: Callable[[NamedSource, bool, int], Examples],
) -> EvaluationSet:
    """Opens an evaluation set.

    Args:
      name: A key of `SETS`, optionally with `/CONFIG`, or `SOURCE@SPLIT`.
      classes: The classes of the network, by which labels are numbered.
      data_dir: The directory in which tfds keeps its data sets; empty for its default.
      make_examples: A function that makes the examples of a source, given the source,
        whether its images are cropped already, and the largest number of labels of an
        image (0 for exactly one label each).

    Raises:
      UserError: The set is unknown or not prepared, or the network lacks one of its
        classes.
    """
    key, _, config = name.partition("/")
    if key not in SETS:
        source_name, split = split_of(name)
        if not split:
            raise UserError(
                f"There is no evaluation set {name!r}.{nearest(key, SETS)} Other sets"
                " are written SOURCE@SPLIT, as in folder:/data/pets@val."
            )
        source = open_source(source_name, split, data_dir=data_dir)
        examples = make_examples(with_classes(source, classes), False, 0)
        return EvaluationSet({"": examples}, False, {})
    spec = SETS[key]
    configs = spec.configs
    if config:
        severities = [known for known in configs if known.startswith(f"{config}_")]
        configs = tuple(severities) or (config,)
    parts = {}
    for config in configs or ("",):
        dataset = f"{key}/{config}" if config else key
        part: NamedSource = TfdsSource(dataset, spec.split, data_dir, spec.most_labels)
        if spec.classes:
            part = Relabelled(part, spec.classes, tuple(range(len(spec.classes))))
        part = with_classes(part, classes)
        parts[config] = make_examples(part, spec.cropped, spec.most_labels)
    return EvaluationSet(parts, spec.occurring_only, spec.reference_errors)


def summarize(opened: EvaluationSet, results: Mapping[str, dict]) -> dict:
    """Combines the results of all configs of a set into one.

    Args:
      opened: The evaluation set.
      results: The result of each config.

    Returns:
      The means of `top1`, `top5` and `loss` over the configs, and the sums of `n_seen`
      and `bad_images`. With several configs also `top1_of` each corruption, and `mce`
      if all corruptions that it is made of are among them.
    """
    means = {
        key: sum(result[key] for result in results.values()) / len(results)
        for key in ("top1", "top5", "loss")
    }
    sums = {
        key: sum(result[key] for result in results.values())
        for key in ("n_seen", "bad_images")
    }
    summary = means | sums
    if len(results) == 1:
        return summary
    by_corruption: dict[str, list[float]] = {}
    for config, result in results.items():
        by_corruption.setdefault(config.rpartition("_")[0], []).append(result["top1"])
    summary["top1_of"] = {
        name: sum(values) / len(values) for name, values in by_corruption.items()
    }
    reference = opened.reference_errors
    if reference and summary["top1_of"].keys() == reference.keys():
        errors = [
            (1 - summary["top1_of"][name]) / reference[name] for name in reference
        ]
        summary["mce"] = sum(errors) / len(errors)
    return summary
