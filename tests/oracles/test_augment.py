"""Augmentations tested against timm, torchvision and TensorFlow on real images."""

import collections
import functools
import math
import operator
import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm_auto
from timm.data import random_erasing as timm_erasing
from torchvision import transforms
from torchvision.transforms import InterpolationMode, autoaugment
from torchvision.transforms import functional as F

from resnet_jax.data import crops, policies
from resnet_jax.data.augment import Augment
from resnet_jax.data.decode import Picture
from resnet_jax.data.image_ops import apply, to_pixels
from resnet_jax.data.resize import INTERPOLATIONS, TENSORFLOW, resize

# The two photographs have 640x427 pixels.
PHOTOGRAPHS = [Image.fromarray(pixels) for pixels in load_sample_images().images]
GREY = PHOTOGRAPHS[0].convert("L")
PICTURES = [*PHOTOGRAPHS, GREY, PHOTOGRAPHS[1].resize((33, 32))]

# The names of operations in torchvision and timm, and their names here.
NAMES = {
    "Identity": "identity",
    "ShearX": "shear_x",
    "ShearY": "shear_y",
    "TranslateX": "translate_x",
    "TranslateY": "translate_y",
    "TranslateXRel": "translate_x",
    "TranslateYRel": "translate_y",
    "SolarizeAdd": "solarize_add",
    "AutoContrast": "autocontrast",
    **{
        name: name.lower()
        for name in (
            *("Rotate", "Brightness", "Color", "Contrast", "Sharpness"),
            *("Posterize", "Solarize", "Equalize", "Invert"),
        )
    },
}
RESAMPLE = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.BILINEAR: Image.Resampling.BILINEAR,
}


def assert_same_pixels(image: Image.Image, expected: Image.Image) -> None:
    """Compares shapes, types and pixels of two images."""
    np.testing.assert_array_equal(to_pixels(image), to_pixels(expected), strict=True)


def assert_same_distribution(sample, reference) -> None:
    """Compares two samples by the test of Kolmogorov and Smirnov.

    Two samples of one distribution fail once in 140,000 times: 2 exp(-2 * 2.5^2).
    """
    sample, reference = np.sort(sample), np.sort(reference)
    values = np.concatenate([sample, reference])
    difference = np.searchsorted(sample, values, "right") / len(sample)
    difference -= np.searchsorted(reference, values, "right") / len(reference)
    n, m = len(sample), len(reference)
    assert np.abs(difference).max() < 2.5 * math.sqrt((n + m) / (n * m))


def assert_same_counts(
    counts: collections.Counter, reference: collections.Counter
) -> None:
    """Compares counts of events of equal probability.

    Two counts differ by more than 5 standard errors once in 1.7 million times.
    """
    assert counts.keys() == reference.keys()
    for key, count in counts.items():
        bound = 5 * math.sqrt(count + reference[key])
        assert abs(count - reference[key]) < bound, key


def assert_same_steps(steps_of_images: list, reference: list) -> None:
    """Compares the numbers, operations and amounts of steps.

    Args:
      steps_of_images: This project's steps (operation, amount), a list per image.
      reference: The steps of another library.
    """
    assert_same_counts(
        *(
            collections.Counter(len(steps) for steps in draws)
            for draws in (steps_of_images, reference)
        )
    )
    amounts = []
    for draws in (steps_of_images, reference):
        by_name = collections.defaultdict(list)
        for steps in draws:
            for op, amount in steps:
                by_name[op].append(amount)
        amounts.append(by_name)
    assert_same_counts(
        *(
            collections.Counter({op: len(values) for op, values in by_name.items()})
            for by_name in amounts
        )
    )
    for op, values in amounts[0].items():
        # Amounts that differ by the rounding of float32 count as equal.
        assert_same_distribution(np.round(values, 4), np.round(amounts[1][op], 4))


# torchvision's operations and policies.


def as_step(name: str, magnitude: float) -> tuple[str, float]:
    """Returns this project's operation and amount for one of torchvision's."""
    op = NAMES[name]
    if op.startswith("translate"):
        return op, -int(magnitude)
    if op in policies.ENHANCE:
        return op, 1 + magnitude
    return op, int(magnitude) if op == "posterize" else magnitude


SPACES = {
    "rand": (policies.RAND, autoaugment.RandAugment(), 31),
    "wide": (policies.WIDE, autoaugment.TrivialAugmentWide(), 31),
    "auto": (policies.RAND, autoaugment.AutoAugment(), 10),
    "augmix": (policies.AUGMIX, autoaugment.AugMix(), 10),
}


@pytest.mark.parametrize("space", SPACES)
def test_amounts_of_policy_operations_equal_torchvision(space):
    extents, theirs, bins = SPACES[space]
    size = (640, 427)
    arguments = () if space == "wide" else ((size[1], size[0]),)
    for name, (magnitudes, signed) in theirs._augmentation_space(
        bins, *arguments
    ).items():
        for k in range(bins):
            magnitude = float(magnitudes[k]) if magnitudes.ndim else 0.0
            for sign in (1, -1):
                expected = as_step(name, sign * magnitude if signed else magnitude)
                op, amount = extents.step(NAMES[name], k / (bins - 1), sign, size)
                assert op == expected[0]
                # In torch's float32, 15.999999 pixels become 15.
                pixel = 1 if op.startswith("translate") else 0
                error = abs(amount - expected[1])
                assert error <= max(pixel, 1e-6 * abs(amount), 1e-5)


@pytest.mark.parametrize("interpolation", RESAMPLE)
@pytest.mark.parametrize("space", ["rand", "wide"])
def test_operations_give_the_pixels_of_torchvision(space, interpolation):
    space = SPACES[space][1]._augmentation_space
    for image in PICTURES:
        size = image.size[::-1]
        for name, (magnitudes, signed) in space(
            31, *(() if "Trivial" in space.__qualname__ else (size,))
        ).items():
            for k in (0, 1, 9, 18, 30) if magnitudes.ndim else (0,):
                for sign in (1, -1) if signed else (1,):
                    magnitude = sign * float(magnitudes[k] if magnitudes.ndim else 0.0)
                    expected = autoaugment._apply_op(
                        image, name, magnitude, interpolation, fill=None
                    )
                    op, amount = as_step(name, magnitude)
                    resample = RESAMPLE[interpolation]
                    found = apply(image, op, amount, resample=resample)
                    assert_same_pixels(found, expected)


def test_invert_and_hue_give_the_pixels_of_torchvision():
    for image in PICTURES:
        assert_same_pixels(apply(image, "invert"), F.invert(image))
        for turn in (-0.5, -0.21, -0.003, 0.0, 0.1, 0.499, 0.5):
            assert_same_pixels(apply(image, "hue", turn), F.adjust_hue(image, turn))


SMALL = Image.fromarray(np.asarray(PHOTOGRAPHS[0].resize((40, 30))))


def torchvisions_steps(monkeypatch, policy, number: int) -> list:
    """Returns the steps that a policy of torchvision applies to a small image.

    They have this project's names; there is a list of them per draw.
    """
    steps = []

    def note(image, name, magnitude, interpolation, fill):
        steps.append(as_step(name, magnitude))
        return image

    monkeypatch.setattr(autoaugment, "_apply_op", note)
    torch.manual_seed(0)
    draws = []
    for _ in range(number):
        steps.clear()
        policy(SMALL)
        draws.append(list(steps))
    return draws


POLICIES = {
    "torchvision_rand_n2_m9": autoaugment.RandAugment(2, 9),
    "torchvision_rand_n3_m15": autoaugment.RandAugment(3, 15),
    "trivial_wide": autoaugment.TrivialAugmentWide(),
    "auto_imagenet": autoaugment.AutoAugment(),
    "auto_cifar10": autoaugment.AutoAugment(autoaugment.AutoAugmentPolicy.CIFAR10),
}


def our_policy(text: str) -> policies.Policy:
    """Returns this project's policy of a name."""
    return policies.parse(
        text, interpolation=Image.Resampling.BILINEAR, mean=(0.485, 0.456, 0.406)
    )


@pytest.mark.parametrize("text", POLICIES)
def test_policies_are_distributed_as_in_torchvision(text, monkeypatch):
    theirs = torchvisions_steps(monkeypatch, POLICIES[text], 4000)
    policy, rng = our_policy(text), np.random.default_rng(0)
    ours = [policy.draw(rng, SMALL.size) for _ in range(4000)]
    assert_same_steps(ours, theirs)


def test_the_tables_of_autoaugment_equal_torchvision():
    for table, kind in (
        (policies.AUTO_IMAGENET, autoaugment.AutoAugmentPolicy.IMAGENET),
        (policies.AUTO_CIFAR10, autoaugment.AutoAugmentPolicy.CIFAR10),
    ):
        theirs = autoaugment.AutoAugment(kind).policies
        assert len(table) == len(theirs) == 25
        for pair, expected in zip(table, theirs, strict=True):
            for (op, probability, magnitude), (name, p, m) in zip(
                pair, expected, strict=True
            ):
                assert (op, probability) == (NAMES[name], p)
                # torchvision omits magnitudes that have no effect.
                assert m in (None, magnitude)


def test_steps_of_augmix_are_distributed_as_in_torchvision(monkeypatch):
    number = 1500
    draws = torchvisions_steps(monkeypatch, autoaugment.AugMix(), number)
    policy, rng = our_policy("augmix"), np.random.default_rng(0)
    # torchvision notes three chains per image.
    ours = [
        [step for _ in range(3) for step in policy.draw(rng, SMALL.size)] for _ in draws
    ]
    assert_same_steps(ours, draws)


def test_images_of_augmix_are_distributed_as_in_torchvision():
    number = 1500
    policy, rng = our_policy("augmix"), np.random.default_rng(0)
    theirs = autoaugment.AugMix()
    torch.manual_seed(0)
    levels = np.asarray(SMALL).astype(float)
    differences = [
        [np.abs(np.asarray(mixed) - levels).mean() for mixed in results]
        for results in (
            [policy(SMALL, rng) for _ in range(number)],
            [theirs(SMALL) for _ in range(number)],
        )
    ]
    assert_same_distribution(*differences)


@pytest.mark.parametrize(
    "widths", [(0.4, 0.4, 0.4, 0.0), (0.4, 0.2, 1.5, 0.1), (0.0, 0.0, 0.3, 0.5)]
)
def test_color_jitter_is_distributed_as_in_torchvision(widths):
    ours = policies.ColorJitter(
        **dict(
            zip(("brightness", "contrast", "saturation", "hue"), widths, strict=True)
        )
    )
    theirs = transforms.ColorJitter(*widths)
    names = ("brightness", "contrast", "color", "hue")
    rng, number = np.random.default_rng(0), 5000
    torch.manual_seed(0)
    draws = []
    for _ in range(number):
        order, *factors = theirs.get_params(
            theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue
        )
        steps = [(names[i], factors[i]) for i in order if factors[i] is not None]
        draws.append(steps)
    own = [ours.draw(rng, SMALL.size) for _ in range(number)]
    assert_same_steps(own, draws)
    assert_same_counts(
        *(
            collections.Counter(tuple(op for op, _ in steps) for steps in drawn)
            for drawn in (own, draws)
        )
    )


# timm's operations and policies.

TIMM = {
    **{name: (NAMES[name], policies.TimmRand()) for name in timm_auto._RAND_TRANSFORMS},
    **{
        name: (
            NAMES[name.removesuffix("Increasing")],
            policies.TimmRand(increasing=True),
        )
        for name in timm_auto._RAND_INCREASING_TRANSFORMS
    },
    "PosterizeOriginal": ("posterize", policies.TimmOriginal()),
}
MEAN_COLOR = (124, 116, 104)


@pytest.mark.parametrize(
    "resample", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC]
)
@pytest.mark.parametrize("name", TIMM)
def test_operations_give_the_pixels_of_timm(name, resample, monkeypatch):
    op, policy = TIMM[name]
    for image in (picture for picture in PICTURES if picture.mode == "RGB"):
        for magnitude in (0, 0.7, 3, 6.4, 7, 9, 10):
            for sign in (1, -1):
                monkeypatch.setattr(
                    timm_auto, "_randomly_negate", functools.partial(operator.mul, sign)
                )
                step = policy.step(op, magnitude / 10, sign, image.size)
                found = apply(image, *step, resample=resample, fill=MEAN_COLOR)
                if step == ("posterize", 0):
                    # Older versions of Pillow give black, and timm fails in this one.
                    assert not np.asarray(found).any()
                    continue
                hparams = {"img_mean": MEAN_COLOR, "interpolation": resample}
                theirs = timm_auto.AugmentOp(name, 1.0, magnitude, hparams)
                assert_same_pixels(found, theirs(image))


@pytest.mark.parametrize(
    "text",
    [
        *("rand-m7-mstd0.5-inc1", "rand-m9-n3-mstd1", "rand-m6-p0.8-mmax8-mstd2-inc1"),
        *("rand-m9-mstdinf-inc1", "rand-m5-n1", "original", "original-mstd0.5"),
    ],
)
def test_policies_are_distributed_as_in_timm(text, monkeypatch):
    steps, number = [], 4000
    functions = {
        function: NAMES.get(name.removesuffix("Increasing").removesuffix("Original"))
        for name, function in timm_auto.NAME_TO_OP.items()
    }

    def noting(function):
        op = functions[function]

        def note(image, *amount, **_):
            (amount,) = amount or (0.0,)
            side = image.size[op == "translate_y"] if "translate" in op else 1
            steps.append((op, amount * side))
            return image

        return note

    monkeypatch.setattr(
        timm_auto,
        "NAME_TO_OP",
        {
            name: noting(function)
            for name, function in timm_auto.NAME_TO_OP.items()
            if functions[function]
        },
    )
    # timm does not parse "inf", but treats numbers above 100 as infinite.
    timms = text.replace("mstdinf", "mstd101")
    if text.startswith("rand"):
        theirs = timm_auto.rand_augment_transform(timms, {})
    else:
        theirs = timm_auto.auto_augment_transform(timms, {})
    random.seed(0)
    np.random.seed(0)
    draws = []
    for _ in range(number):
        steps.clear()
        theirs(SMALL)
        draws.append(list(steps))
    policy, rng = our_policy(text), np.random.default_rng(0)
    assert_same_steps([policy.draw(rng, SMALL.size) for _ in range(number)], draws)


# Crops and erasing.


@pytest.mark.parametrize("size", [(640, 427), (100, 300), (64, 64)])
def test_boxes_are_distributed_as_in_torchvision(size):
    rng, number = np.random.default_rng(0), 4000
    torch.manual_seed(0)
    image = Image.new("L", size)
    found = np.array(
        [
            crops.random_box(rng, size, (0.08, 1.0), (3 / 4, 4 / 3))
            for _ in range(number)
        ]
    )
    theirs = []
    for _ in range(number):
        top, left, height, width = transforms.RandomResizedCrop.get_params(
            image, [0.08, 1.0], [3 / 4, 4 / 3]
        )
        theirs.append((left, top, left + width, top + height))
    for quantity in (
        lambda box: box[:, 0],
        lambda box: box[:, 1],
        lambda box: box[:, 2] - box[:, 0],
        lambda box: box[:, 3] - box[:, 1],
    ):
        assert_same_distribution(quantity(found), quantity(np.array(theirs)))


@pytest.mark.parametrize("mode", crops.PAD_MODES)
def test_padded_crops_are_distributed_as_in_torchvision(mode):
    image, pad, size, number = PHOTOGRAPHS[0].resize((32, 32)), 4, 32, 3000
    torch_mode = {"zero": "constant", "reflect": "reflect"}[mode]
    padded = F.pad(image, pad, padding_mode=torch_mode)
    places = {
        padded.crop((x, y, x + size, y + size)).tobytes(): (x, y)
        for x in range(2 * pad + 1)
        for y in range(2 * pad + 1)
    }
    theirs = transforms.RandomCrop(size, pad, padding_mode=torch_mode)
    torch.manual_seed(0)
    augment = Augment(size=size, crop="pad", pad=pad, pad_mode=mode)
    picture = Picture(np.asarray(image), 3)
    assert_same_counts(
        collections.Counter(
            places[augment(picture, k).tobytes()] for k in range(number)
        ),
        collections.Counter(places[theirs(image).tobytes()] for _ in range(number)),
    )


ERASERS = {
    "timm": (timm_erasing.RandomErasing(0.6, mode="const", device="cpu"), 1),
    "timm, 3": (
        timm_erasing.RandomErasing(0.6, mode="const", max_count=3, device="cpu"),
        3,
    ),
    # torchvision's largest area is 0.33 and its largest ratio 3.3, instead of 1/3 and
    # 10/3 here, which this test cannot distinguish.
    "torchvision": (transforms.RandomErasing(0.6), 1),
}


@pytest.mark.parametrize("name", ERASERS)
def test_erased_boxes_are_distributed_as_in_the_library(name):
    theirs, count = ERASERS[name]
    number, side = 3000, 64
    random.seed(0)
    torch.manual_seed(0)
    erased = [theirs(torch.ones(1, side, side))[0].numpy() == 0 for _ in range(number)]
    white = Picture(np.full((side, side, 1), 255, np.uint8), 1)
    augment = Augment(
        **{"size": side, "crop": "pad", "pad": 0, "mean": (0.0,), "std": (1.0,)},
        **{"erase": 0.6, "erase_count": count},
    )
    ours = [augment(white, key)[:, :, 0] == 0 for key in range(number)]
    for masks in (ours, erased):
        masks[:] = [mask for mask in masks if mask.any()]
    # The bound is 5 standard errors of two counts of probability 0.6.
    assert abs(len(ours) - len(erased)) < 5 * math.sqrt(2 * 0.6 * 0.4 * number)
    for quantity in (
        np.mean,
        lambda mask: np.argmax(mask.any(axis=1)),
        lambda mask: np.argmax(mask.any(axis=0)),
        lambda mask: mask.any(axis=1).sum(),
        lambda mask: mask.any(axis=0).sum(),
    ):
        assert_same_distribution(*([quantity(m) for m in ms] for ms in (ours, erased)))


# Resizing.

SIZES = [(224, 224), (97, 61), (900, 700), (640, 100), (1, 1)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted({*INTERPOLATIONS} - {*TENSORFLOW}))
def test_resizing_gives_the_pixels_of_torchvision(name, size):
    for image in PICTURES:
        expected = F.resize(image, list(size[::-1]), InterpolationMode(name))
        found = resize(to_pixels(image), size, name)
        np.testing.assert_array_equal(found, to_pixels(expected))


def tensorflows(pixels: np.ndarray, size: tuple[int, int], name: str) -> np.ndarray:
    """Returns an image resized by tf.image.resize, in floats."""
    import tensorflow as tf

    method = "bicubic" if "bicubic" in name else "bilinear"
    antialias = name.endswith("antialias")
    return tf.image.resize(pixels, size[::-1], method, antialias=antialias).numpy()


def assert_rounded(pixels: np.ndarray, floats: np.ndarray) -> None:
    """Asserts that pixels are rounded floats.

    Rounding changes them by half a level. Positions in float32 are off by 640 * 2^-24
    of a pixel, over which the image may change by 0.01 levels.
    """
    assert pixels.shape == floats.shape
    assert np.abs(pixels - floats.clip(0, 255)).max() < 0.51


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TENSORFLOW)
def test_resizing_gives_the_pixels_of_tensorflow(name, size):
    for image in PICTURES:
        pixels = to_pixels(image)
        assert_rounded(resize(pixels, size, name), tensorflows(pixels, size, name))


@pytest.mark.parametrize("name", TENSORFLOW)
def test_an_evaluation_image_equals_that_of_the_flax_example(name):
    size = 224
    for image in PICTURES:
        pixels = to_pixels(image)
        # flax/examples/imagenet/input_pipeline.py: _decode_and_center_crop.
        height, width = pixels.shape[:2]
        side = int(size / (size + 32) * min(height, width))
        top, left = (height - side + 1) // 2, (width - side + 1) // 2
        part = pixels[top : top + side, left : left + side]
        found = Augment(size=size, interpolation=name)(
            Picture(pixels, pixels.shape[-1])
        )
        assert_rounded(found, tensorflows(part, (size, size), name))


@pytest.mark.parametrize("size", [(224, 0.875), (32, 1.0), (225, 0.95)])
def test_five_crops_are_those_of_torchvision(size):
    size, fraction = size
    for image in PHOTOGRAPHS:
        resized = F.resize(image, math.floor(size / fraction))
        *corners, center = F.five_crop(resized, size)
        found = Augment(size=size, crop="five", crop_fraction=fraction)(
            Picture(np.asarray(image), 3)
        )
        expected = np.stack([np.asarray(crop) for crop in (center, *corners)])
        assert found.shape == expected.shape
        # Some levels are rounded to the other side, as in the centre crop.
        difference = np.abs(found.astype(int) - expected)
        assert difference.max() <= 2
        assert difference.mean() <= 0.3
