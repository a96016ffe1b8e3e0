"""Images in the forms in which users have them: files, bytes, Pillow's, arrays."""

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import PIL.Image

from resnet_jax import storage
from resnet_jax.data.decode import MODES, Picture
from resnet_jax.errors import UserError

if TYPE_CHECKING:
    Image = str | os.PathLike[str] | bytes | PIL.Image.Image | np.ndarray | jax.Array
    Images = Image | Sequence[Image]
else:
    # Whatever else a user gives is answered by a sentence that says what to give.
    Image = Images = Any

FORMS = (
    "a path, the bytes of an image file, an image of Pillow, a uint8 array [h, w],"
    " [h, w, c] or [n, h, w, c], or a list of these"
)
# Grey, grey with transparency, RGB and RGBA, as Pillow reads arrays.
CHANNELS = (1, 2, 3, 4)
_Bytes = bytes | bytearray | memoryview


def pictures_of(images: Images, channels: int, network: str) -> Iterator[Picture]:
    """Reads images, one at a time as they are taken, without decoding them.

    Args:
      images: What `Card.preprocess` takes, or pictures of this function.
      channels: The number of channels that the network takes.
      network: The network's name in a message.

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
    match image:
        case Picture():
            return [image]
        case str() | os.PathLike():
            return [Picture(_read(image), channels, os.fspath(image))]
        case bytes() | bytearray() | memoryview():
            return [Picture(bytes(image), channels, name)]
        case PIL.Image.Image():
            return [Picture(image, channels, name)]
        case np.ndarray() | jax.Array():
            pixels = _check_pixels(np.asarray(image), name)
            return [Picture(part, channels, name) for part in pixels]
    kind = "None" if image is None else f"of the type {type(image).__name__}"
    raise UserError(f"{name} is {kind}, which is not an image; give {FORMS}.")


def _read(path: str | os.PathLike) -> bytes:
    path = storage.path_of(path)
    try:
        with storage.telling(path):
            return path.read_bytes()
    # A path that holds a null byte raises ValueError.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: {reason}; give the path of an image file.") from None


def _check_pixels(pixels: np.ndarray, name: str) -> np.ndarray:
    """Returns an array as [n, h, w, c]; raises UserError if it is not of images."""
    if pixels.dtype != np.uint8:
        raise UserError(
            f"{name} is an array of {pixels.dtype}, but pixels are uint8 from 0 to"
            " 255: give (255 * x).round().astype('uint8') if x is from 0 to 1, or"
            " x.astype('uint8') if it is from 0 to 255."
        )
    shape = pixels.shape
    if len(shape) == 2:
        pixels = pixels[None, :, :, None]
    elif len(shape) == 3:
        pixels = pixels[None]
    if pixels.ndim == 4 and pixels.shape[-1] in CHANNELS:
        if 0 not in pixels.shape[1:]:
            return pixels
        raise UserError(
            f"{name} has the shape {shape}, so it has no pixels; leave it out."
        )
    if len(shape) in (3, 4) and shape[-3] in CHANNELS:
        advice = "channels come last: give numpy.moveaxis(x, -3, -1)"
    elif len(shape) == 3:
        advice = (
            "choose at most 3 of its channels, or give x[..., None] if these are grey"
            " images [n, h, w]"
        )
    else:
        advice = "choose at most 3 of its channels, or cut it into such arrays"
    raise UserError(
        f"{name} has the shape {shape}, but an array of pixels is [h, w], [h, w, c] or"
        f" [n, h, w, c] with 1 to 4 channels; {advice}."
    )
