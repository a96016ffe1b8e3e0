"""Encoded images -> uint8 pixels: RGB or grey, upright, whatever the file holds."""

import contextlib
import io

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from resnet_jax.errors import BadImageError

MODES = {1: "L", 3: "RGB"}


def decode(
    image: bytes | UInt8[np.ndarray, "h w c"], channels: int, name: str
) -> Image.Image:
    """Returns an image as Pillow's RGB (3 channels) or L (1 channel).

    Grey, palette, CMYK and 16-bit images are converted, transparency is dropped, and
    an EXIF orientation is carried out, so that the image is upright.

    Args:
      image: the bytes of an image file, or pixels.
      channels: 1 or 3.
      name: what to call the image if it cannot be decoded.

    Raises:
      BadImageError: the image is empty, truncated or not an image.
    """
    if isinstance(image, np.ndarray):
        return _to_mode(
            Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image), channels
        )
    if not image:
        raise BadImageError(f"{name}: the file is empty.")
    try:
        decoded = Image.open(io.BytesIO(image))
        decoded.load()
        # A broken EXIF block does not make the pixels bad.
        with contextlib.suppress(Exception):
            ImageOps.exif_transpose(decoded, in_place=True)
        return _to_mode(decoded, channels)
    except MemoryError:
        raise
    # Pillow raises many types on broken files: OSError, SyntaxError, struct.error ...
    except Exception as error:
        reason = str(error) or type(error).__name__
        if "cannot identify image file" in reason:
            reason = "not an image in a known format"
        raise BadImageError(f"{name}: cannot be decoded: {reason}.") from None


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        # Pillow's own conversion clips 16 bits at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P":
        # Pillow warns if a palette's transparency is not dropped by way of RGBA.
        image = image.convert("RGBA")
    return image.convert(MODES[channels])
