"""Crops, erasing and resizing: their distributions, bounds and references."""

import collections
import math

import numpy as np
import pytest
from PIL import Image

from resnet_jax.data.augment import Augment
from resnet_jax.data.crops import random_box
from resnet_jax.data.decode import Picture
from resnet_jax.data.resize import INTERPOLATIONS
from resnet_jax.errors import UserError
from tests.helpers.pictures import encode, noise, picture

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def boxes(size, *, number: int, seed: int = 0, scale=SCALE, ratio=RATIO):
    rng = np.random.default_rng(seed)
    return np.array([random_box(rng, size, scale, ratio) for _ in range(number)])


def distance_from_uniform(values: np.ndarray, low: float, high: float) -> float:
    """Returns the Kolmogorov-Smirnov distance from the uniform distribution."""
    expected = (np.sort(values) - low) / (high - low)
    observed = np.arange(1, len(values) + 1) / len(values)
    return np.abs(observed - expected).max()


@pytest.mark.parametrize(
    "size",
    [(500, 375), (375, 500), (333, 333), (1, 1), (2, 3), (17, 5), (9, 1000), (1000, 9)],
)
def test_a_box_is_never_empty_and_lies_within_the_image(size):
    left, top, right, bottom = boxes(size, number=300).T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right > left).all()
    assert (bottom > top).all()
    assert (right <= size[0]).all()
    assert (bottom <= size[1]).all()


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (100, 100), (256, 100)])
def test_area_and_ratio_of_a_box_are_within_their_bounds(size):
    left, top, right, bottom = boxes(size, number=2000).T
    width, height = right - left, bottom - top
    # Each side is rounded by at most half a pixel.
    assert ((width + 0.5) / (height - 0.5) >= RATIO[0]).all()
    assert ((width - 0.5) / (height + 0.5) <= RATIO[1]).all()
    assert ((width + 0.5) * (height + 0.5) >= SCALE[0] * size[0] * size[1]).all()
    assert (width * height <= size[0] * size[1]).all()


def test_area_is_uniform_and_ratio_log_uniform():
    # Up to half of the area of a square, every ratio fits, so no box is rejected.
    side, scale, number = 4000, (0.08, 0.5), 2000
    left, top, right, bottom = boxes((side, side), number=number, scale=scale).T
    width, height = right - left, bottom - top
    # One sample in a thousand exceeds the bound (Kolmogorov). Rounding is negligible:
    # half a pixel is 1 / 2000 of the smallest side.
    bound = 1.95 / math.sqrt(number)
    area = width * height / side**2
    assert distance_from_uniform(area, *scale) < bound
    assert distance_from_uniform(np.log(width / height), *np.log(RATIO)) < bound
    # The position of the box is uniform, too.
    across, down = left / (side - width), top / (side - height)
    assert distance_from_uniform(across, 0, 1) < bound
    assert distance_from_uniform(down, 0, 1) < bound
    # The four are independent: the bound is 4 standard errors of a correlation.
    correlations = np.corrcoef([area, width / height, across, down])
    assert np.abs(correlations[np.triu_indices(4, 1)]).max() < 4 / math.sqrt(number)


# torchvision 0.29's RandomResizedCrop.get_params on the same sizes.
TORCHVISION_FALLBACK = {
    (1, 1000): (0, 499, 1, 500),
    (1000, 1): (499, 0, 500, 1),
    (2000, 100): (933, 0, 1066, 100),
    (100, 2000): (0, 933, 100, 1066),
    (3001, 101): (1433, 0, 1568, 101),
}


@pytest.mark.parametrize("size", TORCHVISION_FALLBACK)
def test_extreme_shapes_fall_back_on_torchvisions_centre_crop(size):
    # No box of 0.9 of the area with a ratio up to 4 / 3 fits into these images.
    result = boxes(size, number=20, scale=(0.9, 1.0))
    assert (result == TORCHVISION_FALLBACK[size]).all()


def test_boxes_are_those_of_earlier_versions():
    # With other boxes, older runs could not be resumed or repeated.
    result = [boxes((500, 375), number=1, seed=seed)[0].tolist() for seed in range(3)]
    assert result == [[65, 166, 194, 337], [4, 13, 370, 295], [111, 94, 342, 354]]


def test_a_box_is_a_function_of_the_generator():
    first = boxes((500, 375), number=20, seed=1)
    assert (first == boxes((500, 375), number=20, seed=1)).all()
    assert len(np.unique(first, axis=0)) == 20
    assert (first != boxes((500, 375), number=20, seed=2)).any(axis=1).all()


@pytest.mark.parametrize("interpolation", ("bilinear", "bicubic"))
def test_a_random_resized_crop_crops_and_then_resizes(interpolation):
    image = noise(0, 61, 47)
    augment = Augment(size=32, crop="random_resized", interpolation=interpolation)
    filters = {
        "bilinear": Image.Resampling.BILINEAR,
        "bicubic": Image.Resampling.BICUBIC,
    }
    for seed in range(5):
        box = random_box(np.random.default_rng(seed), image.size, SCALE, RATIO)
        expected = image.crop(box).resize((32, 32), filters[interpolation])
        result = augment(picture(image), seed)
        np.testing.assert_array_equal(result, np.asarray(expected), strict=True)


SIDE, PAD = 8, 3
# All pixels differ, and none of them is zero.
NUMBERED = np.arange(1, SIDE * SIDE + 1, dtype=np.uint8).reshape(SIDE, SIDE)


def test_pad_and_crop_reaches_every_offset_with_zeros_outside():
    augment = Augment(size=SIDE, crop="pad", pad=PAD)
    padded = np.pad(NUMBERED, PAD)
    window = range(2 * PAD + 1)
    crops = {
        padded[top : top + SIDE, left : left + SIDE].tobytes(): (top, left)
        for top in window
        for left in window
    }
    counts = dict.fromkeys(crops.values(), 0)
    number = 2000
    for key in range(number):
        crop = augment(picture(Image.fromarray(NUMBERED)), key)
        assert crop.shape == (SIDE, SIDE, 1)
        counts[crops[crop.tobytes()]] += 1
    # 5 standard errors of a count of probability 1 / 49, exceeded once in 35,000 tests.
    expected = number / len(counts)
    error = math.sqrt(expected * (1 - 1 / len(counts)))
    assert max(abs(count - expected) for count in counts.values()) < 5 * error


def test_pad_and_crop_resizes_other_sizes_first():
    image = noise(0, 40, 30)
    result = Augment(size=16, crop="pad", pad=0)(picture(image), 0)
    expected = image.resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(result, np.asarray(expected))


def test_crops_of_many_images_at_once_are_those_of_each_image():
    augment = Augment(size=SIDE, crop="pad", pad=PAD, flip=True)
    images = np.stack([np.asarray(noise(seed, SIDE, SIDE)) for seed in range(10)])
    keys = np.arange(10, dtype=np.uint64) ** 7
    together = augment.pad_and_crop(images, keys)
    for image, key, result in zip(images, keys.tolist(), together, strict=True):
        np.testing.assert_array_equal(augment(Picture(image, 3), key), result)


def test_half_of_the_images_are_mirrored():
    augment = Augment(size=SIDE, crop="pad", pad=0, flip=True)
    mirrored, number = 0, 4000
    for key in range(number):
        result = augment(picture(Image.fromarray(NUMBERED)), key)[:, :, 0]
        is_mirrored = bool(result[0, 0] > result[0, -1])
        expected = NUMBERED[:, ::-1] if is_mirrored else NUMBERED
        np.testing.assert_array_equal(result, expected)
        mirrored += is_mirrored
    # 4 standard errors of a fair coin, which is 0.03.
    assert abs(mirrored - number / 2) < 4 * math.sqrt(number) / 2


@pytest.mark.parametrize("crop", ("random_resized", "pad", "center"))
def test_every_crop_can_be_mirrored(crop):
    # The flip is drawn after the crop, which is therefore the same.
    plain = Augment(size=16, crop=crop)
    flipping = Augment(size=16, crop=crop, flip=True)
    mirrored = 0
    for seed in range(20):
        crops = [
            augment(picture(noise(0, 30, 20)), seed) for augment in (plain, flipping)
        ]
        if (crops[0] != crops[1]).any():
            np.testing.assert_array_equal(crops[0], crops[1][:, ::-1])
            mirrored += 1
    # All or none of 20 would be mirrored once in half a million times.
    assert 0 < mirrored < 20


def test_without_flip_nothing_is_mirrored():
    augment = Augment(size=SIDE, crop="pad", pad=0)
    for seed in range(20):
        result = augment(picture(Image.fromarray(NUMBERED)), seed)
        np.testing.assert_array_equal(result[:, :, 0], NUMBERED)


def torchvision_rule(image: Image.Image, size: int, fraction: float, resample):
    """Returns CenterCrop(size) of Resize(floor(size / fraction)), by Pillow."""
    short = math.floor(size / fraction)
    long = int(short * max(image.size) / min(image.size))
    landscape = image.width > image.height
    resized = image.resize((long, short) if landscape else (short, long), resample)
    left = round((resized.width - size) / 2.0)
    top = round((resized.height - size) / 2.0)
    return resized.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("shape", [(500, 375), (1000, 700), (2100, 1700), (97, 61)])
def test_a_fast_crop_is_near_the_exact_one(shape):
    # Enlarged noise, in which neighbours are similar as in photographs; two filters
    # never agree on noise itself.
    image = noise(0, 8, 6).resize(shape, Image.Resampling.BICUBIC)
    jpeg = Picture(encode(image, "JPEG", quality=90), 3)
    differences = [
        np.abs(fast.astype(int) - exact)
        for key in range(10)
        for fast, exact in [
            [
                Augment(size=64, crop="random_resized", flip=True, decode=decode)(
                    jpeg, key
                )
                for decode in ("fast", "exact")
            ]
        ]
    ]
    # The fast crop's edges are rounded to pixels of the shrunken image. On 300 ImageNet
    # images at 224 px the mean difference is 0.8 of 255 levels.
    assert np.mean(differences) < 3


@pytest.mark.parametrize("fraction", (0.875, 0.95, 1.0))
@pytest.mark.parametrize("size", (224, 225, 32))
@pytest.mark.parametrize(
    "shape",
    [
        *((500, 375), (375, 500), (333, 333), (257, 401), (401, 257), (640, 223)),
        *((224, 224), (256, 256), (600, 7), (7, 600), (1, 1)),
        *((33, 31), (31, 33), (300, 301), (301, 300)),
    ],
)
def test_a_center_crop_equals_torchvisions(shape, size, fraction):
    # torchvision's Resize and CenterCrop give exactly the pixels of the rule.
    image = noise(0, *shape)
    result = Augment(size=size, crop_fraction=fraction)(picture(image), None)
    expected = torchvision_rule(image, size, fraction, Image.Resampling.BILINEAR)
    # Only the kept box is resized, so some levels round differently between Pillow's
    # two passes. The largest mean difference that was measured is 0.26 levels.
    difference = np.abs(result.astype(int) - np.asarray(expected))
    assert result.shape == np.asarray(expected).shape
    assert difference.max() <= 2
    assert difference.mean() <= 0.3


def test_a_bicubic_center_crop_equals_torchvisions():
    image = noise(0, 101, 77)
    result = Augment(size=64, interpolation="bicubic")(picture(image), None)
    expected = torchvision_rule(image, 64, 0.875, Image.Resampling.BICUBIC)
    assert np.abs(result.astype(int) - np.asarray(expected)).max() <= 1


def test_a_crop_fraction_of_two_sizes_gives_exactly_these_sizes():
    image = noise(0, 232, 232)
    for size in (160, 176, 224):
        result = Augment(size=size, crop_fraction=size / 232)(picture(image))
        edge = (232 - size) // 2
        expected = image.crop((edge, edge, edge + size, edge + size))
        np.testing.assert_array_equal(result, np.asarray(expected))


def test_an_image_of_the_right_size_keeps_its_pixels():
    image = noise(0, 32, 32)
    result = Augment(size=32, crop_fraction=1.0)(picture(image), None)
    np.testing.assert_array_equal(result, np.asarray(image))


@pytest.mark.parametrize("crop", ("random_resized", "pad", "center"))
@pytest.mark.parametrize("mode", ("L", "RGB"))
def test_grey_stays_one_channel_and_color_three(crop, mode):
    image = noise(0, 50, 40).convert(mode)
    result = Augment(size=24, crop=crop, flip=True)(picture(image), 0)
    assert result.shape == (24, 24, len(mode))
    assert result.dtype == np.uint8


@pytest.mark.parametrize(
    "wrong, nearest",
    [
        ({"crop": "centre"}, "center"),
        ({"crop": "random_resize"}, "random_resized"),
        ({"interpolation": "bicubik"}, "bicubic"),
        ({"interpolation": "bi-linear"}, "bilinear"),
    ],
)
def test_a_wrong_name_is_reported_with_the_nearest(wrong, nearest):
    with pytest.raises(UserError, match=f"Did you mean {nearest}"):
        Augment(size=8, **wrong)


@pytest.mark.parametrize("fraction", (0.0, -1.0, 1.01))
def test_a_crop_fraction_outside_of_0_to_1_is_reported(fraction):
    with pytest.raises(UserError, match="crop_fraction"):
        Augment(size=8, crop_fraction=fraction)


def test_a_short_side_crop_has_any_of_its_lengths_and_positions():
    # A ramp: levels depend on the position, and their slope on the enlargement.
    ramp = np.linspace(0, 255, 40).astype(np.uint8)
    image = Image.fromarray(np.tile(ramp, (20, 1)))
    augment = Augment(size=16, crop="short_side", short_side=(20, 24))
    number = 1000
    result = [augment(picture(image), key)[:, :, 0] for key in range(number)]
    expected = {}
    for short in range(20, 25):
        resized = image.resize((2 * short, short), Image.Resampling.BILINEAR)
        for left in range(2 * short - 15):
            row = np.asarray(resized)[0, left : left + 16].astype(int)
            expected.setdefault(short, {})[left] = row
    lengths = []
    for crop in result:
        # Only the kept box is resized, so levels may round differently.
        distances = {
            short: min(np.abs(crop - row).max() for row in rows.values())
            for short, rows in expected.items()
        }
        lengths.append(min(distances, key=distances.get))
        assert min(distances.values()) <= 1
    assert set(lengths) == {20, 21, 22, 23, 24}


def test_a_short_side_shorter_than_the_crop_is_reported():
    with pytest.raises(UserError, match=r"data\.short_side=\(20, 30\).* at least"):
        Augment(size=32, crop="short_side", short_side=(20, 30))


def test_reflection_pads_with_the_reflected_image():
    augment = Augment(size=SIDE, crop="pad", pad=PAD, pad_mode="reflect")
    padded = np.pad(NUMBERED, PAD, "reflect")
    window = range(2 * PAD + 1)
    crops = {
        padded[y : y + SIDE, x : x + SIDE].tobytes() for y in window for x in window
    }
    for key in range(200):
        assert augment(picture(Image.fromarray(NUMBERED)), key).tobytes() in crops


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_padding_as_wide_as_the_image_is_reported(mode):
    with pytest.raises(UserError, match=r"data\.pad=8 must be less"):
        Augment(size=8, crop="pad", pad=8, pad_mode=mode)


def test_erasing_leaves_the_mean_colour():
    mean = (0.485, 0.456, 0.406)
    common = {"size": 64, "crop": "pad", "pad": 0, "mean": mean}
    augment = Augment(**common, erase=0.25)
    image = noise(0, 64, 64)
    erased, number = [], 2000
    for key in range(number):
        result = augment(picture(image), key)
        changed = (result != np.asarray(image)).any(axis=-1)
        if changed.any():
            erased.append(changed.mean())
            # The step normalises the mean colour to 0, up to half a level.
            np.testing.assert_array_equal(
                result[changed], [[124, 116, 104]] * changed.sum()
            )
    # 5 standard errors of a probability of one quarter.
    assert abs(len(erased) - number / 4) < 5 * math.sqrt(number * 3 / 16)
    # Each side is rounded by at most half a pixel.
    assert min(erased) > 0.02 - 2 / 64
    assert max(erased) < 1 / 3 + 2 / 64


def test_erasing_with_noise_gives_a_clipped_normal_distribution():
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    black = Image.new("RGB", (64, 64))
    augment = Augment(
        **{"size": 64, "crop": "pad", "pad": 0, "mean": mean, "std": std},
        **{"erase": 1.0, "erase_mode": "pixel"},
    )
    levels = []
    for key in range(200):
        result = augment(picture(black), key)
        rows, columns = (result.any(axis=-1).any(axis=axis) for axis in (1, 0))
        levels.append(result[rows][:, columns].reshape(-1, 3))
    levels = np.concatenate(levels)
    normalised = (levels / 255 - mean) / std
    # The mean and deviation of N(0, 1) clipped to the range of the levels, integrated.
    x = np.linspace(-8, 8, 100_001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    low, high = (0 - np.array(mean)) / std, (1 - np.array(mean)) / std
    clipped = x[:, None].clip(low, high)
    expected = (clipped * density[:, None]).sum(axis=0)
    spread = np.sqrt((clipped**2 * density[:, None]).sum(axis=0) - expected**2)
    # 5 standard errors; rounding adds a variance of 1 / 12 of a squared level to 58^2.
    bound = 5 / math.sqrt(len(levels))
    np.testing.assert_allclose(normalised.mean(axis=0), expected, atol=bound)
    np.testing.assert_allclose(normalised.std(axis=0), spread, atol=bound)
    fraction = ((levels == 0) | (levels == 255)).mean()
    assert 0.02 < fraction < 0.06


def test_colout_keeps_rows_and_columns_in_their_order():
    augment = Augment(size=SIDE, crop="pad", pad=0, colout=0.25)
    assert (augment.side, augment.shape) == (6, (6, 6))
    kept = collections.Counter()
    number = 1000
    for key in range(number):
        result = (
            augment(picture(Image.fromarray(NUMBERED)), key)[:, :, 0].astype(int) - 1
        )
        rows, columns = result[:, 0] // SIDE, result[0] % SIDE
        np.testing.assert_array_equal(result, rows[:, None] * SIDE + columns)
        assert (np.diff(rows) > 0).all()
        assert (np.diff(columns) > 0).all()
        kept.update(rows.tolist())
    # Each row is kept three times in four; the bound is 5 standard errors.
    error = math.sqrt(number * 3 / 16)
    assert max(abs(count - number * 3 / 4) for count in kept.values()) < 5 * error


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"colout": 0.95}, "data.colout=0.95 leaves nothing of data.image_size=8"),
        ({"colout": 1.5}, "data.colout=1.5 must be from 0 to 1"),
        ({"erase": -0.1}, "data.erase=-0.1 must be from 0 to 1"),
        ({"erase_count": 0}, "data.erase_count=0"),
        ({"erase_mode": "pixels"}, "Did you mean pixel"),
        ({"pad_mode": "reflection"}, "Did you mean reflect"),
        ({"lighting": -1.0}, "data.lighting"),
        ({"color_jitter": (0.4, 0.4, 0.4)}, "four numbers"),
        ({"color_jitter": (0.4, 0.4, 0.4, 0.6)}, "at most 0.5"),
        ({"color_jitter": (0.4, -0.4, 0.4, 0.0)}, "at least 0"),
        ({"crop": "short_side", "short_side": (8,)}, "a smallest and a largest length"),
        ({"interpolation": "tf_cubic"}, "Did you mean tf_bicubic"),
    ],
)
def test_a_wrong_value_is_reported_with_its_key(wrong, message):
    with pytest.raises(UserError, match=message):
        Augment(size=8, **wrong)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_every_interpolation_keeps_a_plain_colour(interpolation):
    plain = Image.new("RGB", (41, 29), (255, 130, 0))
    for crop in ("random_resized", "center", "short_side", "five"):
        for size in (16, 64):
            augment = Augment(
                size=size, crop=crop, short_side=(80, 90), interpolation=interpolation
            )
            result = augment(picture(plain), 0)
            assert (result == (255, 130, 0)).all()


def test_only_antialiased_interpolations_average_when_they_shrink():
    # Without antialiasing, three of four pixels in each row are ignored.
    row = np.tile(np.array([255, 0, 0, 0], np.uint8), 16)
    image = picture(Image.fromarray(np.tile(row, (64, 1))))
    augmented = {
        name: Augment(size=16, crop_fraction=1.0, interpolation=name)(image)
        for name in INTERPOLATIONS
    }
    assert not augmented["tf_bilinear"].any()
    for name in ("bilinear", "tf_bilinear_antialias"):
        assert abs(augmented[name].mean() - 255 / 4) < 4
