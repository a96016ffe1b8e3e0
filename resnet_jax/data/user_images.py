"""Images in the forms in which users pass them: files, bytes, Pillow's, arrays."""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import PIL.Image
from jaxtyping import UInt8

from resnet_jax.data.decode import MODES, Picture
from resnet_jax.errors import BadImageError, UserError
from resnet_jax.persistence import storage

if TYPE_CHECKING:
    Array = np.ndarray | jax.Array
    Image = str | os.PathLike[str] | bytes | PIL.Image.Image | Array | Picture
    Images = Image | Sequence[Image]
else:
    # At run time nothing checks the type: a message says which forms there are.
    Image = Images = Any

FORMS = (
    "a path, the bytes of an image file, an image of Pillow, a uint8 array [h, w],"
    " [h, w, c] or [n, h, w, c], or a list of these"
)
# Channels of the arrays that Pillow reads: grey, grey and alpha, RGB, RGBA.
CHANNELS = (1, 2, 3, 4)
_Bytes = bytes | bytearray | memoryview


def pictures_of(images: Images, channels: int, network: str) -> Iterator[Picture]:
    """Yields images one at a time, each read when it is asked for, without decoding.

    Args:
      images: Images in the forms that `Card.preprocess` takes, or pictures that this
        function has returned.
      channels: The number of channels that the network takes.
      network: The network's name in a message.

    Yields:
      A picture for each image; an array [n, h, w, c] gives n of them.

    Raises:
      UserError: An image has another form, its file cannot be read, or the network
        takes neither grey nor colour images.
    """
    if channels not in MODES:
        raise UserError(
            f"{network} takes {channels} channels; image files have 1 or 3. Prepare its"
            " input yourself, and apply its module to that."
        )
    if isinstance(images, Sequence) and not isinstance(images, str | _Bytes):
        for number, image in enumerate(images):
            yield from _pictures_of(image, channels, f"images[{number}]")
    else:
        yield from _pictures_of(images, channels, "The image")


def _pictures_of(image: Image, channels: int, name: str) -> list[Picture]:
    if isinstance(image, Picture):
        return [image]
    if isinstance(image, str | os.PathLike):
        name = os.fspath(image) or name
    return [Picture(part, channels, name) for part in parts_of(image, channels, name)]


def parts_of(
    image: Image, channels: int, name: str
) -> list[bytes | PIL.Image.Image | np.ndarray]:
    """Returns the images in a path, bytes, an image of Pillow or an array.

    Args:
      image: The image, or an array of several.
      channels: The number of channels of the result, which distinguishes an image
        [h, w, c] from grey images [n, h, w].
      name: The name of the image in a message.

    Raises:
      UserError: The image has another form, or its file cannot be read.
    """
    match image:
        case str() | os.PathLike():
            return [_read(image)]
        case bytes() | bytearray() | memoryview():
            return [bytes(image)]
        case PIL.Image.Image():
            return [image]
        case np.ndarray() | jax.Array():
            return list(check_pixels(np.asarray(image), channels, name))
    kind = "None" if image is None else f"of the type {type(image).__name__}"
    raise UserError(f"{name} is {kind}, which is not an image; give {FORMS}.")


def _read(path: str | os.PathLike) -> bytes:
    path = storage.path_of(path)
    try:
        if storage.is_remote(path):
            with storage.explaining_errors(path):
                return path.read_bytes()
        return path.read_bytes()
    # A training run can skip such images.
    except OSError as error:
        reason = error.strerror or str(error)
        raise BadImageError(
            f"{path}: {reason}; give the path of an image file."
        ) from None


def check_pixels(
    pixels: np.ndarray, channels: int, name: str
) -> UInt8[np.ndarray, "n h w c"]:
    """Checks that an array holds images, and gives it four axes.

    Args:
      pixels: One image or several, as in `parts_of`.
      channels: The number of channels of the result; see `parts_of`.
      name: The name of the array in a message.

    Returns:
      The images, with 1 to 4 channels as they are in `pixels`.

    Raises:
      UserError: The array does not hold images.
    """
    if pixels.dtype != np.uint8:
        raise UserError(
            f"{name} is an array of {pixels.dtype}, but pixels are uint8 from 0 to"
            " 255: give (255 * x).round().astype('uint8') if x is from 0 to 1, or"
            " x.astype('uint8') if it is from 0 to 255."
        )
    shape = pixels.shape
    if len(shape) == 2:
        pixels = pixels[None, :, :, None]
    elif len(shape) == 3 and channels == 1 and shape[-1] not in CHANNELS:
        pixels = pixels[..., None]
    elif len(shape) == 3:
        pixels = pixels[None]
    if pixels.ndim == 4 and pixels.shape[-1] in CHANNELS:
        if 0 not in pixels.shape[1:]:
            return pixels
        raise UserError(
            f"{name} has the shape {shape}, so it has no pixels; leave it out."
        )
    advice = []
    if len(shape) in (3, 4) and shape[-3] in CHANNELS:
        advice.append("numpy.moveaxis(x, -3, -1) if the channels come first")
    if len(shape) == 3:
        advice.append("x[..., None] if these are grey images [n, h, w]")
    advice.append("x[..., :3] if it has more channels")
    raise UserError(
        f"{name} has the shape {shape}, but an array of pixels is [h, w], [h, w, c] or"
        f" [n, h, w, c] with 1 to 4 channels; give {', or '.join(advice)}."
    )
