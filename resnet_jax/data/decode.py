"""Decoding of image files of any kind to upright uint8 pixels, RGB or grey."""

import contextlib
import dataclasses
import functools
import io
import re
import struct
import threading
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image

from resnet_jax.config.defaults import MAX_PIXELS
from resnet_jax.data._nvimgcodec import nvimgcodec
from resnet_jax.errors import BadImageError, UserError

MODES = {1: "L", 3: "RGB"}
SPACES = {1: "GRAY", 3: "RGB"}
# The turn that makes an image upright, for each orientation but 1 (Exif 2.3, 4.6.4 A).
# ImageOps.exif_transpose also rewrites the metadata, which fails if they are damaged.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = ExifTags.Base.Orientation
# Markers of a JPEG: the segment of EXIF and XMP, and the beginning of the pixels.
APP1, START_OF_SCAN = 0xE1, 0xDA
# The brands of HEIC files (ISO/IEC 23008-12, annex B).
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}

# Pillow warns of damaged metadata without saying in which file; the pixels are good.
# The filters of users come first.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.", append=True)

_thread = threading.local()
_lock = threading.Lock()
# The limits of the threads that use Pillow now, and Pillow's limit before they began.
_limits: list[int] = []
_limit_before: int | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image whose size is known before its pixels are decoded.

    Attributes:
      image: The bytes of an image file, uint8 pixels [h, w, c] or an image of Pillow.
      channels: The number of channels of the decoded pixels, 1 or 3.
      name: The name of the image in a message.
      max_pixels: The number of pixels beyond which a file is rejected before memory is
        taken for them.
    """

    image: bytes | UInt8[np.ndarray, "h w c"] | Image.Image
    channels: int
    name: str = "an image"
    max_pixels: int = MAX_PIXELS

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
        and the image is turned upright as its EXIF orientation says, or that of its XMP
        where EXIF gives none.

        Args:
          shrink: The factor, 1, 2 or 4, by which a JPEG may be decoded smaller, with
            sides rounded up. This takes less time and acts as a box filter.

        Raises:
          BadImageError: The image is empty, truncated, not an image, or has more than
            `max_pixels`.
          UserError: There is too little memory for its pixels.
        """
        try:
            if size := self._jpeg_size:
                with contextlib.suppress(ValueError):
                    return self._jpeg(size, shrink)
                # Pillow reads some JPEGs that simplejpeg does not, and says what is
                # wrong with the others.
            return self._any_kind
        except MemoryError:
            raise UserError(
                f"{self.name}: there is too little memory to decode it; free some, or"
                " reject such images with a lower data.max_pixels."
            ) from None

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
        self._check_size(width, height)
        # The weights of RGB in a grey level differ from the weights of Y in YCbCr.
        plain = space in (("YCbCr", "Gray") if self.channels == 3 else ("Gray",))
        return (width, height) if plain and not _is_turned(image) else None

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise self._too_large(width * height, f"{width}x{height} = ")

    def _too_large(self, pixels: int, sides: str = "") -> BadImageError:
        return BadImageError(
            f"{self.name} claims {sides}{pixels:,} pixels, more than"
            f" data.max_pixels={self.max_pixels}; if it is that large, allow it with"
            f" --config.data.max_pixels={pixels} (--max_pixels in predict and prepare,"
            " max_pixels in Python)."
        )

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
            if isinstance(self.image, Image.Image):
                return _to_pixels(self.image, self.channels)
            with _pillow_limited_to(self.max_pixels):
                opened = _open(self.image)
                self._check_size(*opened.size)
                return _to_pixels(opened, self.channels)
        except (BadImageError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise self._too_large(int(re.findall(r"\d+", str(error))[0])) from None
        # Pillow raises many types of errors for broken files: OSError, SyntaxError,
        # struct.error and others.
        except Exception as error:
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
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


class _Limit(int):
    """A limit of Pillow's beyond which it raises an error without warning before.

    Pillow warns beyond its limit, and raises an error beyond 2 * limit.
    """

    def __rmul__(self, factor: int) -> int:
        return int(self)


@contextlib.contextmanager
def _pillow_limited_to(max_pixels: int) -> Iterator[None]:
    """Makes Pillow reject larger images, also those that are found inside of others.

    The limit is a global variable of Pillow's, so it is that of all threads that are
    inside of this context, and after them the one that was set before.
    """
    global _limit_before
    with _lock:
        if not _limits:
            _limit_before = Image.MAX_IMAGE_PIXELS
        _limits.append(max_pixels)
        Image.MAX_IMAGE_PIXELS = _Limit(max(_limits))
    try:
        yield
    finally:
        with _lock:
            _limits.remove(max_pixels)
            Image.MAX_IMAGE_PIXELS = _Limit(max(_limits)) if _limits else _limit_before


def _open(content: bytes) -> Image.Image:
    """Opens an image file of any format without decoding it.

    `Image.open` would check the size before the caller knows it, and print a warning
    where this build of Pillow cannot read a format.

    Raises:
      Exception: The file cannot be read; see `Picture._any_kind`.
    """
    if content[4:8] == b"ftyp" and HEIC_BRANDS.intersection(_brands(content)):
        if not _register_heic():
            raise OSError(
                "HEIC needs pillow-heif, which pip install pillow-heif installs"
            )
        formats, reason = ["HEIF"], "not a complete HEIC image"
    else:
        formats, reason = Image.ID, "not an image in a known format"
    for register_formats in (Image.preinit, Image.init):
        register_formats()
        for name in formats:
            # PostScript is a program, which another program would run.
            if name == "EPS":
                continue
            make, accepts = Image.OPEN[name]
            # The errors by which Pillow's formats say that a file is of another one.
            with contextlib.suppress(SyntaxError, IndexError, TypeError, struct.error):
                answer = accepts(content[:16]) if accepts else True
                if isinstance(answer, str):
                    reason = f"{answer[:1].lower()}{answer[1:]}"
                elif answer:
                    return make(io.BytesIO(content), "")
    raise OSError(reason)


def _brands(content: bytes) -> list[bytes]:
    """Returns the brands of a file whose first box is `ftyp` (ISO/IEC 14496-12)."""
    end = min(int.from_bytes(content[:4]), 256)
    return [content[start : start + 4] for start in range(8, end, 4)]


@functools.cache
def _register_heic() -> bool:
    """Lets Pillow read HEIC, and tells whether pillow-heif, which does, is there."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _is_turned(jpeg: bytes) -> bool:
    """Tells whether a JPEG's metadata say that its pixels are not upright."""
    if not _has_metadata(jpeg):
        return False
    try:
        return _open(jpeg).getexif().get(ORIENTATION, 1) != 1
    except Exception:
        # Pillow then reads the file, and reports or ignores what is broken.
        return True


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    """Returns the turn that makes an image upright, or None if it is upright."""
    # Broken metadata do not make the pixels bad.
    with contextlib.suppress(Exception):
        return TURNS.get(image.getexif()[ORIENTATION])
    return None


def _has_metadata(jpeg: bytes) -> bool:
    """Tells whether EXIF or XMP precede a JPEG's pixels (ITU-T T.81, annex B)."""
    place = 2
    while jpeg[place : place + 1] == b"\xff" and len(jpeg) > place + 4:
        marker = jpeg[place + 1]
        if marker == APP1:
            return True
        if marker == START_OF_SCAN:
            return False
        # Any number of bytes 0xff may precede a marker.
        length = int.from_bytes(jpeg[place + 2 : place + 4]) + 2
        place += 1 if marker == 0xFF else length
    return False


def _to_pixels(image: Image.Image, channels: int) -> np.ndarray:
    """Decodes an image, turns it upright and converts it."""
    image.load()
    turn = _turn_of(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode in ("I", "I;16", "I;16B", "I;16L", "I;16N"):
        # Pillow's own conversion clips 16 bits at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "P":
        # Pillow warns if a palette's transparency is not dropped by way of RGBA.
        image = image.convert("RGBA")
    pixels = np.asarray(image.convert(MODES[channels]))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels
