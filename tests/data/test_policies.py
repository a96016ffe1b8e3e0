"""Random policies by name: the operations that they draw, and their determinism."""

import collections
import math

import numpy as np
import pytest
from PIL import Image

from resnet_jax.data import policies
from resnet_jax.data.augment import Augment
from resnet_jax.data.image_ops import (
    COLOR_VALUES,
    COLOR_VECTORS,
    add_lighting,
    apply,
    to_pixels,
)
from resnet_jax.errors import UserError
from tests.helpers.pictures import noise, picture, quadrants

SIZE = (224, 160)
MEAN = (0.485, 0.456, 0.406)
NAMES = (*policies.EXAMPLES, "rand-m9-n3-p0.7-mmax8", "original-mstd0.5")


def parse(text: str) -> policies.Policy:
    return policies.parse(text, interpolation=Image.Resampling.BILINEAR, mean=MEAN)


def draws(text: str, number: int) -> list:
    policy, rng = parse(text), np.random.default_rng(0)
    return [policy.draw(rng, SIZE) for _ in range(number)]


def assert_uniform(counts: collections.Counter, draws: int, outcomes: int) -> None:
    """Checks that counts are within 5 standard errors, exceeded once in 1.7 million."""
    assert len(counts) == outcomes
    expected = draws / outcomes
    error = math.sqrt(expected * (1 - 1 / outcomes))
    assert max(abs(count - expected) for count in counts.values()) < 5 * error


def test_timms_randaugment_applies_each_operation_half_of_the_time():
    number = 6000
    drawn = draws("rand-m7-mstd0.5-inc1", number)
    counts = collections.Counter(len(steps) for steps in drawn)
    # Two operations are each applied with probability one half.
    for done, probability in ((0, 0.25), (1, 0.5), (2, 0.25)):
        error = math.sqrt(number * probability * (1 - probability))
        assert abs(counts[done] - number * probability) < 5 * error
    ops = collections.Counter(op for steps in drawn for op, _ in steps)
    assert_uniform(ops, ops.total(), 15)


def test_torchvisions_randaugment_applies_every_operation():
    drawn = draws("torchvision_rand_n2_m9", 4000)
    assert {len(steps) for steps in drawn} == {2}
    assert_uniform(
        collections.Counter(op for steps in drawn for op, _ in steps), 8000, 14
    )


def test_timm_and_torchvision_rotate_by_different_angles():
    # timm rotates by 21 degrees at magnitude 7 of 10, with noise; torchvision by 9
    # degrees at magnitude 9 of 30.
    timm = [
        a for s in draws("rand-m7-mstd0.5-inc1", 4000) for op, a in s if op == "rotate"
    ]
    torchvision = [
        a for s in draws("torchvision_rand_n2_m9", 999) for op, a in s if op == "rotate"
    ]
    # 5 standard errors; the standard deviation of the angles is 1.5 degrees.
    assert abs(np.abs(timm).mean() - 21) < 5 * 1.5 / math.sqrt(len(timm))
    assert np.abs(torchvision) == pytest.approx(9.0)
    assert min(torchvision) < 0 < max(torchvision)


def test_trivialaugment_applies_one_operation_of_any_strength():
    drawn = draws("trivial_wide", 8000)
    assert {len(steps) for steps in drawn} == {1}
    amounts = collections.defaultdict(set)
    for ((op, amount),) in drawn:
        amounts[op].add(round(abs(amount), 6))
    assert amounts["rotate"] == {round(4.5 * k, 6) for k in range(31)}
    assert amounts["translate_y"] == {int(32 * k / 30) for k in range(31)}
    assert amounts["posterize"] == {2, 3, 4, 5, 6, 7, 8}
    assert (min(amounts["color"]), max(amounts["color"])) == (0.01, 1.99)


def test_augmix_stays_near_the_original_image():
    policy, image = parse("augmix"), quadrants()
    mixed = [policy(image, np.random.default_rng(seed)) for seed in range(200)]
    assert {m.size for m in mixed} == {image.size}
    levels = np.asarray(image).astype(float)
    distances = [np.abs(np.asarray(m) - levels).mean() for m in mixed]
    # The distance of unrelated black and white pictures is 128.
    assert 1 < np.mean(distances) < 40
    # Some chains do not change such a plain picture.
    assert len({m.tobytes() for m in mixed}) > 150


@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("text", NAMES)
def test_every_policy_keeps_size_and_channels(text, channels):
    image = noise(0, 20, 30).convert("RGB" if channels == 3 else "L")
    policy = policies.parse(
        text, interpolation=Image.Resampling.BICUBIC, mean=MEAN[:channels]
    )
    for seed in range(60):
        result = policy(image, np.random.default_rng(seed))
        assert (result.mode, result.size) == (image.mode, image.size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trivial", "Did you mean trivial_wide"),
        ("auto_imagnet", "Did you mean auto_imagenet"),
        ("randaugment", "There is no data.policy='randaugment'"),
        ("rand-m7-x3", "There is no 'x3' in data.policy='rand-m7-x3'; it takes m, n"),
        ("rand-n2.5", "'n2.5' in data.policy='rand-n2.5' must be a whole number"),
        ("original-m3", "it takes mstd"),
        ("torchvision_rand_n2_m31", "m in data.policy='torchvision_rand_n2_m31' must"),
        ("torchvision_rand_9", "Did you mean torchvision_rand_n2_m9"),
    ],
)
def test_a_wrong_policy_is_reported(text, message):
    with pytest.raises(UserError, match=message):
        parse(text)
    with pytest.raises(UserError, match=message):
        Augment(size=8, policy=text)


def test_the_numbers_in_policy_names_are_parsed():
    policy = parse("rand-m9-n3-p0.7-mstd0.5-mmax12-inc1")
    assert (policy.magnitude, policy.layers, policy.probability) == (9, 3, 0.7)
    assert (policy.std, policy.most, policy.increasing) == (0.5, 12, True)
    assert policy.fill == (124, 116, 104)
    assert parse("rand-mstd101").std == math.inf
    assert parse("torchvision_rand").magnitude == 9
    assert parse("torchvision_rand_n3").ops == 3


def test_posterize_may_keep_zero_bits():
    image = noise(0, 9, 9)
    levels = to_pixels(image)
    for bits in range(9):
        result = to_pixels(apply(image, "posterize", bits))
        np.testing.assert_array_equal(result, levels >> (8 - bits) << (8 - bits))


def test_lighting_adds_the_principal_components_of_colours():
    pixels = to_pixels(noise(0, 9, 7))
    weights = np.array([0.1, -0.2, 0.05])
    # Red: 0.2175 * 0.1 * -0.5675 + 0.0188 * -0.2 * 0.7192 + 0.0045 * 0.05 * 0.4009.
    red = -0.01234 - 0.0027042 + 0.0000902
    expected = np.rint(pixels[:, :, 0] + 255 * red).clip(0, 255)
    # The sum is exact to 0.01 levels, which does not change the rounding here.
    np.testing.assert_array_equal(add_lighting(pixels, weights)[:, :, 0], expected)
    # The components are orthonormal, to 4 digits.
    np.testing.assert_allclose(COLOR_VECTORS.T @ COLOR_VECTORS, np.eye(3), atol=2e-4)
    assert (np.diff(COLOR_VALUES) < 0).all()


FULL = {
    "policy": "rand-m9-mstd0.5-inc1",
    "color_jitter": (0.4, 0.4, 0.4, 0.1),
    "lighting": 0.1,
    "erase": 0.5,
    "erase_mode": "pixel",
}


@pytest.mark.parametrize("crop", ("random_resized", "pad", "center", "short_side"))
def test_pixels_are_a_function_of_the_key(crop):
    augment = Augment(size=16, crop=crop, short_side=(20, 30), flip=True, **FULL)
    image = picture(noise(0, 50, 40))
    first = [augment(image, key) for key in range(20)]
    again = [augment(image, key) for key in range(20)]
    np.testing.assert_array_equal(first, again)
    assert len({pixels.tobytes() for pixels in first}) == 20
