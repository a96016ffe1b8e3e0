"""An image gives the same input in every form in which a user may have it."""

import dataclasses
import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from resnet_jax.errors import UserError
from resnet_jax.weights.card import Card, default_card

ORIENTATION = 0x0112


def card_of(channels: int = 3, **facts) -> Card:
    """Returns the card of a network for small images."""
    card = default_card("cifar_resnet20")
    spec = dataclasses.replace(card.make_spec(), in_channels=channels)
    return dataclasses.replace(card.for_spec(spec), **facts)


def photo(height: int = 40, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(
        256, size=(height, width, 3), dtype=np.uint8
    )


def file_of(image: Image.Image, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, **options)
    return content.getvalue()


def picture_of_mode(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(photo()[:, :, 0].astype(np.uint16) * 257)
    return Image.fromarray(photo()).convert(mode)


def test_every_form_of_an_image_gives_the_same_input(tmp_path):
    card, pixels = card_of(), photo()
    picture = Image.fromarray(pixels)
    content = file_of(picture, format="PNG")
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    forms = [path, str(path), content, bytearray(content), picture, pixels]
    forms += [pixels[None], jnp.asarray(pixels)]
    together = card.preprocess(forms)
    assert together.shape == (len(forms), 32, 32, 3)
    assert together.dtype == np.float32
    for number, form in enumerate(forms):
        alone = card.preprocess(form)
        assert alone.shape == (1, 32, 32, 3)
        np.testing.assert_array_equal(alone[0], together[number])
        np.testing.assert_array_equal(alone[0], together[0])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_grey_images_need_no_channel_axis_if_the_network_takes_grey_images(count):
    pixels = np.stack([photo()[:, :, 0] + i for i in range(count)])
    card = card_of(channels=1)
    expected = card.preprocess(pixels[..., None])
    np.testing.assert_array_equal(card.preprocess(pixels), expected)
    with pytest.raises(UserError, match=r"x\[\.\.\., None\] if these are grey images"):
        card_of(channels=3).preprocess(pixels)


def test_a_list_may_contain_arrays_of_several_images():
    card, pixels = card_of(), photo()
    result = card.preprocess([np.stack([pixels] * 3), pixels[:, :, 0]])
    assert result.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(result[3], card.preprocess(pixels[:, :, 0])[0])
    np.testing.assert_array_equal(result[3], card.preprocess(pixels[:, :, :1])[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "format"),
    [
        *(("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF")),
        *(("RGB", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("I;16", "TIFF")),
        *(("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("CMYK", "TIFF")),
    ],
)
def test_a_pillow_image_of_any_mode_gives_the_same_input_as_its_file(
    mode, format, channels
):
    card = card_of(channels)
    content = file_of(picture_of_mode(mode), format=format)
    opened = Image.open(io.BytesIO(content))
    before = opened.copy()
    np.testing.assert_array_equal(card.crop(opened), card.crop(content))
    assert opened.mode == before.mode
    assert opened.tobytes() == before.tobytes()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_pillow_image_with_an_orientation_gives_the_same_input_as_its_file(
    format, orientation
):
    card, exif = card_of(), Image.Exif()
    exif[ORIENTATION] = orientation
    content = file_of(Image.fromarray(photo()), format=format, exif=exif)
    opened = Image.open(io.BytesIO(content))
    expected = card.crop(content)
    np.testing.assert_array_equal(card.crop(opened), expected)
    # The user's image has not been modified.
    np.testing.assert_array_equal(card.crop(opened), expected)


def test_the_input_is_the_normalised_crop():
    card = card_of(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), bgr=True)
    pixels = photo(32, 32)
    expected = (pixels[:, :, ::-1] / 255 - card.mean) / card.std
    # float32 rounds values up to 3 by less than 1e-6.
    np.testing.assert_allclose(card.preprocess(pixels)[0], expected, atol=1e-6)


def test_the_channels_are_those_of_the_network():
    grey = card_of(1)
    expected = np.asarray(Image.fromarray(photo(32, 32)).convert("L"))
    np.testing.assert_array_equal(grey.crop(photo(32, 32))[0, :, :, 0], expected)
    assert grey.preprocess([photo(), photo()[:, :, 0]]).shape == (2, 32, 32, 1)


def test_no_images_give_an_empty_input():
    assert card_of().preprocess([]).shape == (0, 32, 32, 3)
    assert card_of(1).preprocess(np.zeros((0, 8, 8, 1), np.uint8)).shape == (
        *(0, 32, 32),
        1,
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "The image is None, which is not an image; give a path"),
        (2.5, "of the type float"),
        ({"a": 1}, "of the type dict"),
        (iter([]), "or a list of these"),
        ([[photo()]], r"images\[0\] is of the type list"),
        (photo() / 255, r"array of float64.*\(255 \* x\)\.round\(\)\.astype"),
        (jnp.zeros((4, 4)), r"array of float32.*astype\('uint8'\)"),
        (photo() > 3, "array of bool"),
        (np.zeros((5, 28, 28), np.uint8), r"give x\[\.\.\., None\]"),
        (np.zeros((3, 28, 28), np.uint8), r"numpy\.moveaxis\(x, -3, -1\)"),
        (np.zeros((9, 3, 8, 8), np.uint8), r"numpy\.moveaxis\(x, -3, -1\)"),
        (np.zeros((8, 8, 300), np.uint8), r"x\[\.\.\., :3\] if it has more channels"),
        (
            np.zeros((2, 8, 8, 300), np.uint8),
            r"x\[\.\.\., :3\] if it has more channels",
        ),
        (np.zeros((1, 1, 8, 8, 3), np.uint8), r"\[n, h, w, c\] with 1 to 4"),
        (np.zeros(8, np.uint8), r"the shape \(8,\)"),
        (np.zeros((0, 8, 3), np.uint8), "has no pixels; leave it out"),
        ("gone.png", r"gone\.png: No such file.*give the path"),
        ("a\0b.png", "null byte"),
        ("https://a.b/c.png", r"gs:// and s3:// and local paths are"),
        (".", "Is a directory"),
        (b"", "the file is empty; replace it"),
        ([photo(), b"GIF89a"], r"images\[1\]: cannot be decoded.*; replace it"),
        (file_of(Image.fromarray(photo()), format="PNG")[:500], "truncated"),
    ],
)
def test_a_wrong_image_raises_one_sentence_that_says_what_to_give(images, message):
    with pytest.raises(UserError, match=message) as error:
        card_of().preprocess(images)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(".")


def test_the_advice_of_the_error_for_arrays_works():
    card, pixels = card_of(), photo()
    expected = card.preprocess(pixels)
    for x in (pixels / 255, jnp.asarray(pixels, jnp.float32) / 255):
        result = card.preprocess((255 * x).round().astype("uint8"))
        np.testing.assert_array_equal(result, expected)
    for x in (pixels.astype(np.float64), jnp.asarray(pixels, int)):
        np.testing.assert_array_equal(card.preprocess(x.astype("uint8")), expected)
    first = np.moveaxis(pixels, -1, 0)
    np.testing.assert_array_equal(card.preprocess(np.moveaxis(first, -3, -1)), expected)
    assert card.preprocess(pixels[..., 0][None][..., None]).shape == (1, 32, 32, 3)


def test_a_truncated_image_of_pillow_raises_a_user_error():
    content = file_of(Image.fromarray(photo()), format="PNG")[:500]
    with pytest.raises(UserError, match=r"The image: cannot be decoded: .*truncated"):
        card_of().preprocess(Image.open(io.BytesIO(content)))
