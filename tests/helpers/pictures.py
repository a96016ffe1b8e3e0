"""Makes small pictures, and files and sources of pictures."""

import io
import pathlib

import numpy as np
from PIL import Image

from resnet_jax.data.augment import Augment
from resnet_jax.data.decode import Picture
from resnet_jax.data.loader import Examples
from resnet_jax.data.sources import open_source

RED, GREEN, BLUE, YELLOW = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)


def quadrants(width: int = 48, height: int = 32) -> Image.Image:
    """Makes red and green above blue and yellow quadrants: no corners are equal."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    pixels[height // 2 :, : width // 2] = BLUE
    pixels[height // 2 :, width // 2 :] = YELLOW
    return Image.fromarray(pixels)


def picture(image: Image.Image) -> Picture:
    """Wraps an image as the decoded picture that augmentation takes."""
    pixels = np.atleast_3d(np.asarray(image))
    return Picture(pixels, pixels.shape[-1])


def noise(seed: int, width: int, height: int) -> Image.Image:
    """Makes an image of uniformly random pixels."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    """Returns the content of an image file in a format of Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(root: pathlib.Path, files: dict[str, bytes]) -> str:
    """Writes files below a directory, and returns the name of that data source."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return f"folder:{root}"


def examples(
    source: str,
    split: str = "train",
    *,
    size: int = 8,
    channels: int = 3,
    skip_bad: bool = False,
    **augment,
) -> Examples:
    """Makes the examples of a split like a run does."""
    return Examples(
        source=open_source(source, split, fake_shape=(size, size, channels)),
        augment=Augment(size=size, **augment),
        channels=channels,
        skip_bad=skip_bad,
    )
