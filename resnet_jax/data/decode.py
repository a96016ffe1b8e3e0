"""Decoding of image files of any kind to upright uint8 pixels, RGB or grey."""

import contextlib
import dataclasses
import functools
import io
import threading

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image, ImageOps

from resnet_jax.data._nvimgcodec import nvimgcodec
from resnet_jax.errors import BadImageError

MODES = {1: "L", 3: "RGB"}
SPACES = {1: "GRAY", 3: "RGB"}
# The EXIF tag of the orientation, and markers of a JPEG.
ORIENTATION = 0x0112
EXIF, START_OF_SCAN = 0xE1, 0xDA

_thread = threading.local()


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image whose size is known before its pixels are decoded.

    Attributes:
      image: The bytes of an image file, uint8 pixels [h, w, c] or an image of Pillow.
      channels: The number of channels of the decoded pixels, 1 or 3.
      name: The name of the image in a message.
    """

    image: bytes | UInt8[np.ndarray, "h w c"] | Image.Image
    channels: int
    name: str = "an image"

    @functools.cached_property
    def size(self) -> tuple[int, int]:
        """The width and height in pixels, upright.

        Raises:
          BadImageError: The image cannot be decoded, as in `pixels`.
        """
        if self._jpeg_size:
            return self._jpeg_size
        height, width, _ = self.pixels().shape
        return width, height

    def pixels(self, shrink: int = 1) -> UInt8[np.ndarray, "h w {self.channels}"]:
        """Decodes the image.

        Grey, palette, CMYK and 16-bit images are converted, transparency is dropped,
        and an EXIF orientation is applied, so that the image is upright.

        Args:
          shrink: The factor, 1, 2 or 4, by which a JPEG may be decoded smaller, with
            sides rounded up. This takes less time and acts as a box filter.

        Raises:
          BadImageError: The image is empty, truncated or not an image.
        """
        if size := self._jpeg_size:
            with contextlib.suppress(ValueError):
                return self._jpeg(size, shrink)
            # Pillow reads some JPEGs that simplejpeg does not, and says what is wrong
            # with the others.
        return self._any_kind

    def part(
        self, left: int, top: int, right: int, bottom: int
    ) -> UInt8[np.ndarray, "h w {self.channels}"]:
        """Returns `pixels()[top:bottom, left:right]`, decoding only that if possible.

        Raises:
          BadImageError: The image cannot be decoded, as in `pixels`; but damage outside
            the part may go unnoticed.
        """
        part = None
        if nvimgcodec and self.channels == 3 and self._jpeg_size and self._is_complete:
            region = nvimgcodec.Region(top, left, bottom, right)
            stream = nvimgcodec.CodeStream(self.image).get_sub_code_stream(
                region=region
            )
            part = _region_decoder().decode(stream)
        if part is not None:
            return np.asarray(part)
        return self.pixels()[top:bottom, left:right]

    @property
    def _is_complete(self) -> bool:
        """Tells whether a JPEG ends with its last marker, so it is not truncated."""
        return isinstance(self.image, bytes) and self.image.endswith(b"\xff\xd9")

    @functools.cached_property
    def _jpeg_size(self) -> tuple[int, int] | None:
        """The width and height of a JPEG that needs no conversion; None otherwise."""
        image = self.image
        if not isinstance(image, bytes) or not image.startswith(b"\xff\xd8"):
            return None
        try:
            height, width, space, _ = simplejpeg.decode_jpeg_header(image)
        except ValueError:
            return None
        # The weights of RGB in a grey level differ from the weights of Y in YCbCr.
        plain = space in (("YCbCr", "Gray") if self.channels == 3 else ("Gray",))
        return (width, height) if plain and not _is_turned(image) else None

    def _jpeg(self, size: tuple[int, int], shrink: int) -> np.ndarray:
        width, height = size
        least = (-(-height // shrink), -(-width // shrink)) if shrink > 1 else (0, 0)
        # With these options, pixels are equal to Pillow's, bit for bit.
        return simplejpeg.decode_jpeg(
            self.image,
            SPACES[self.channels],
            fastdct=False,
            fastupsample=False,
            min_height=least[0],
            min_width=least[1],
        )

    @functools.cached_property
    def _any_kind(self) -> np.ndarray:
        if isinstance(self.image, np.ndarray):
            if self.image.shape[-1] == self.channels:
                return self.image
            pixels = self.image[:, :, 0] if self.image.shape[-1] == 1 else self.image
            return _to_pixels(Image.fromarray(pixels), self.channels)
        if self.image == b"":
            raise BadImageError(f"{self.name}: the file is empty.")
        try:
            decoded: Image.Image
            if isinstance(self.image, bytes):
                decoded = Image.open(io.BytesIO(self.image))
            else:
                decoded = self.image
            decoded.load()
            # A broken EXIF block does not make the pixels bad.
            with contextlib.suppress(Exception):
                if decoded is self.image:
                    # A user's own image of Pillow is not modified.
                    decoded = ImageOps.exif_transpose(decoded)
                else:
                    ImageOps.exif_transpose(decoded, in_place=True)
            return _to_pixels(decoded, self.channels)
        except MemoryError:
            raise
        # Pillow raises many types of errors for broken files: OSError, SyntaxError,
        # struct.error and others.
        except Exception as error:
            reason = str(error) or type(error).__name__
            if "cannot identify image file" in reason:
                reason = "not an image in a known format"
            raise BadImageError(f"{self.name}: cannot be decoded: {reason}.") from None


def _region_decoder():
    """Returns this thread's decoder of parts of JPEGs, which uses only the CPU."""
    if not hasattr(_thread, "decoder"):
        _thread.decoder = nvimgcodec.Decoder(
            device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY,
            backends=[nvimgcodec.Backend(nvimgcodec.CPU_ONLY)],
            max_num_cpu_threads=1,
        )
    return _thread.decoder


def _is_turned(jpeg: bytes) -> bool:
    """Tells whether a JPEG's EXIF block says that its pixels are not upright."""
    if not _has_exif(jpeg):
        return False
    try:
        return Image.open(io.BytesIO(jpeg)).getexif().get(ORIENTATION, 1) != 1
    except Exception:
        # Pillow then reads the file, and reports or ignores what is broken.
        return True


def _has_exif(jpeg: bytes) -> bool:
    """Tells whether an EXIF block precedes the pixels (ITU-T T.81, annex B)."""
    place = 2
    while jpeg[place : place + 1] == b"\xff" and len(jpeg) > place + 4:
        marker = jpeg[place + 1]
        if marker == EXIF and jpeg.startswith(b"Exif\0\0", place + 4):
            return True
        if marker == START_OF_SCAN:
            return False
        # Any number of bytes 0xff may precede a marker.
        length = int.from_bytes(jpeg[place + 2 : place + 4]) + 2
        place += 1 if marker == 0xFF else length
    return False


def _to_pixels(image: Image.Image, channels: int) -> np.ndarray:
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        # Pillow's own conversion clips 16 bits at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P":
        # Pillow warns if a palette's transparency is not dropped by way of RGBA.
        image = image.convert("RGBA")
    pixels = np.asarray(image.convert(MODES[channels]))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
