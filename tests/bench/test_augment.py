"""The contact sheet shows the pictures, and what the config does to them."""

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
    """Two JPEGs of 96x64."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in "ab":
        file = folder / f"{name}.jpg"
        file.write_bytes(encode(quadrants(96, 64), "JPEG", quality=95))
    return folder


def draw(images, *more: str) -> np.ndarray:
    path = images.parent / "sheet.png"
    size = ["--rows=3", "--columns=4"]
    main(["bench", "augment", CONFIG, f"--images={images}", f"--save={path}", *size])
    plain = np.asarray(Image.open(path))
    if not more:
        return plain
    command = [CONFIG, f"--images={images}", f"--save={path}", *size, *more]
    main(["bench", "augment", *command])
    changed = np.asarray(Image.open(path))
    assert changed.shape == plain.shape
    return changed


def test_a_sheet_has_a_row_a_picture_and_the_original_on_the_left(images):
    side = train_augment(load("tiny_imagenet20")).side
    sheet = draw(images)
    assert sheet.shape == (4 + 2 * (side + 4), 4 + 5 * (side + 4), 3)
    original = sheet[4 : 4 + side, 4 : 4 + side]
    # 96x64 in a square: black above and below, all four colours between.
    assert not original[: side // 8].any()
    middle = original[side // 4 : -side // 4]
    assert middle[2, 2, 0] > 200 > 60 > middle[2, 2, 2]
    assert middle[-2, 2, 2] > 200 > 60 > middle[-2, 2, 0]
    # The same picture twice, but no two versions alike.
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


def test_a_sheet_is_of_the_data_without_pictures_of_yours(tmp_path):
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
def test_a_wrong_override_is_told(argument, message, images):
    with pytest.raises(UserError, match=message):
        draw(images, argument)


# Of the last, Pillow only reads them.
@pytest.mark.parametrize("name", ["sheet", "sheet.foo", "sheet.fits"])
def test_a_sheet_is_a_picture(name, images):
    with pytest.raises(UserError, match="must be the name of a picture"):
        main(["bench", "augment", CONFIG, f"--images={images}", f"--save={name}"])


def test_where_a_sheet_cannot_be_is_told(images):
    save = f"--save={images}/no/sheet.png"
    with pytest.raises(UserError, match=r"sheet\.png: No such file or directory\."):
        main(["bench", "augment", CONFIG, f"--images={images}", save, "--rows=1"])


def test_an_archive_that_is_none_is_told(tmp_path):
    archive = tmp_path / "images.zip"
    archive.write_text("no archive")
    with pytest.raises(UserError, match=r"images\.zip cannot be read: File is not a"):
        main(["bench", "augment", CONFIG, f"--images={archive}", "--save=sheet.png"])
