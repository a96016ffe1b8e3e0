"""An image folder has torchvision's classes, images and labels, in its order."""

import pytest
import torchvision

from resnet_jax.data.sources import open_source
from tests.helpers.pictures import encode, noise, write_folder

JPEG = encode(noise(0, 8, 8), "JPEG")
NAMES = (
    *("Zebra/1.jpg", "ant/10.jpg", "ant/9.JPG", "ant/deep/er/1.png", "ant/a.jpeg"),
    *("ant-eater/1.webp", "ant-eater/b/1.jpg", "ant-eater/b-c/1.jpg", "10/x.bmp"),
    *("9/x.tif", "a b/\n.ppm", "é/1.jpg", "e\u0301/1.jpg", "n/only/below/1.jpg"),
    *("Ant/a/2.jpg", "Ant/b.jpg", "Ant/a.jpg/3.jpg", "Ant/notes.txt"),
)


@pytest.fixture
def folder(tmp_path) -> str:
    source = write_folder(tmp_path, {f"train/{name}": JPEG for name in NAMES})
    (tmp_path / "train/linked").symlink_to("ant")
    (tmp_path / "train/Zebra/linked").symlink_to("../ant/deep")
    (tmp_path / "train/Zebra/2.jpg").symlink_to("1.jpg")
    return source


def test_a_folder_is_that_of_torchvision(folder):
    source = open_source(folder, "train")
    theirs = torchvision.datasets.ImageFolder(str(source.root))
    assert list(source.classes) == theirs.classes
    ours = [(source.name(i), label) for i, label in enumerate(source.labels)]
    assert ours == theirs.samples
    assert len(ours) == 23
