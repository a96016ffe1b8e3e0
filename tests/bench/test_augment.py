"""Tests of `bench augment`, the contact sheet of augmented pictures."""

import numpy as np
import pytest
from PIL import Image

from resnet_jax.bench.__main__ import main
from resnet_jax.errors import UserError
from resnet_jax.training.datasets import train_augment
from tests.helpers.golden_configs import load
from tests.helpers.pictures import encode, quadrants

CONFIG = "--config=configs/tiny_imagenet20.py"


@pytest.fixture
def images(tmp_path):
    """Makes a folder of two JPEGs of 96x64 pixels."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "ab":
        file = folder / f"{name}.jpg"
        file.write_bytes(encode(quadrants(96, 64), "JPEG", quality=95))
    return folder


def draw(images, *overrides: str) -> np.ndarray:
    """Draws a contact sheet without overrides, and then again with them."""
    path = images.parent / "sheet.png"
    size = ["--rows=3", "--columns=4"]
    main(["bench", "augment", CONFIG, f"--images={images}", f"--save={path}", *size])
    plain = np.asarray(Image.open(path))
    if not overrides:
        return plain
    command = [CONFIG, f"--images={images}", f"--save={path}", *size, *overrides]
    main(["bench", "augment", *command])
    changed = np.asarray(Image.open(path))
    assert changed.shape == plain.shape
    return changed


def test_a_sheet_has_a_row_per_picture_with_the_original_on_the_left(images):
    side = train_augment(load("tiny_imagenet20")).side
    sheet = draw(images)
    assert sheet.shape == (4 + 2 * (side + 4), 4 + 5 * (side + 4), 3)
    original = sheet[4 : 4 + side, 4 : 4 + side]
    # The original of 96x64 is padded to a square: black above and below, and its four
    # colours between.
    assert not original[: side // 8].any()
    middle = original[side // 4 : -side // 4]
    assert middle[2, 2, 0] > 200 > 60 > middle[2, 2, 2]
    assert middle[-2, 2, 2] > 200 > 60 > middle[-2, 2, 0]
    # Both rows begin with the same picture, but no two versions are equal.
    cells = [
        sheet[y : y + side, x : x + side].tobytes()
        for y in (4, 8 + side)
        for x in range(4, sheet.shape[1] - 1, side + 4)
    ]
    assert cells[0] == cells[5]
    assert len(set(cells)) == 9


def test_a_sheet_takes_overrides(images):
    side = train_augment(load("tiny_imagenet20")).side
    mean = np.rint(255 * np.array(load("tiny_imagenet20").data.mean))
    sheet = draw(images, "--config.data.erase=1.0", "--config.data.erase_count=2")
    for x in range(1, 5):
        cell = sheet[4 : 4 + side, 4 + x * (side + 4) :][:, :side]
        assert (cell == mean).all(axis=-1).mean() > 0.009


def test_without_images_a_sheet_shows_the_training_data(tmp_path):
    path = tmp_path / "sheet.png"
    config = "--config=configs/quickstart.py"
    main(["bench", "augment", config, f"--save={path}", "--rows=2", "--columns=3"])
    side = train_augment(load("quickstart")).side
    assert Image.open(path).size == (4 + 4 * (side + 4), 4 + 2 * (side + 4))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.data.polic=augmix", "Did you mean data.policy"),
        ("--config.data.policy=augmixed", "Did you mean augmix"),
        ("--config.data.erase=much", "data.erase=much is not a number"),
        ("--config.data.erase=(1,)", "data.erase"),
        ("--polic=augmix", "There is no flag --polic"),
    ],
)
def test_a_wrong_override_is_reported(argument, message, images):
    with pytest.raises(UserError, match=message):
        draw(images, argument)


# Pillow can read .fits files, but not write them.
@pytest.mark.parametrize("name", ["sheet", "sheet.foo", "sheet.fits"])
def test_a_sheet_must_be_a_picture(name, images):
    with pytest.raises(UserError, match="must end with the suffix of a picture"):
        main(["bench", "augment", CONFIG, f"--images={images}", f"--save={name}"])


def test_a_sheet_that_cannot_be_written_is_reported(images):
    save = f"--save={images}/no/sheet.png"
    with pytest.raises(UserError, match=r"sheet\.png cannot be written: there is no"):
        main(["bench", "augment", CONFIG, f"--images={images}", save, "--rows=1"])


def test_a_file_that_is_not_an_archive_is_reported(tmp_path):
    archive = tmp_path / "images.zip"
    archive.write_text("not an archive")
    with pytest.raises(UserError, match=r"images\.zip cannot be read: File is not a"):
        main(["bench", "augment", CONFIG, f"--images={archive}", "--save=sheet.png"])
