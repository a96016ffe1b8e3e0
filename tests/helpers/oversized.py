"""Makes small image files of many formats whose headers claim a large size."""

import struct
import zlib

from PIL import Image

from tests.helpers.pictures import encode

RED = Image.new("RGB", (16, 16), (200, 10, 10))
# The largest side of a WebP file.
WEBP_SIDE = 16383


def _patched(file: bytes, place: int, content: bytes) -> bytes:
    return file[:place] + content + file[place + len(content) :]


def _jpeg(side: int, marker: bytes = b"\xff\xc0", mode: str = "RGB", **options):
    """Returns a JPEG whose frame header, after `marker`, claims the size."""
    file = encode(RED.convert(mode), "JPEG", **options)
    return _patched(file, file.index(marker) + 5, struct.pack(">HH", side, side))


def _png(side: int, file: bytes | None = None) -> bytes:
    file = file or encode(RED, "PNG")
    header = struct.pack(">II", side, side) + file[24:29]
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return file[:16] + header + checksum + file[33:]


def _gif(side: int, **options) -> bytes:
    return _patched(encode(RED, "GIF", **options), 6, struct.pack("<HH", side, side))


def _gif_with_a_large_frame(side: int) -> bytes:
    file = encode(RED, "GIF")
    return _patched(file, file.index(b",\0\0\0\0") + 5, struct.pack("<HH", side, side))


def _tiff(side: int, **options) -> bytes:
    file = encode(RED, "TIFF", **options)
    (start,) = struct.unpack("<I", file[4:8])
    (count,) = struct.unpack("<H", file[start : start + 2])
    for place in range(start + 2, start + 2 + 12 * count, 12):
        (tag,) = struct.unpack("<H", file[place : place + 2])
        # The tags of the width and the height.
        if tag in (256, 257):
            file = _patched(file, place, struct.pack("<HHII", tag, 4, 1, side))
    return file


def _webp(side: int) -> bytes:
    """Returns a WebP file whose canvas is as large as the format allows."""
    exif = Image.Exif()
    exif[0x010F] = "maker"
    file = encode(RED, "WEBP", exif=exif)
    size = (min(side, WEBP_SIDE) - 1).to_bytes(3, "little")
    return _patched(file, file.index(b"VP8X") + 12, size + size)


def _jpeg2000(side: int) -> bytes:
    file = encode(RED, "JPEG2000")
    return _patched(file, file.index(b"ihdr") + 4, struct.pack(">II", side, side))


def _ico(side: int) -> bytes:
    """Returns an icon that claims 16 x 16 pixels and holds a larger PNG."""
    file = encode(RED, "ICO")
    start = file.index(b"\x89PNG")
    return file[:start] + _png(side, file[start:])


def files_that_claim(side: int) -> dict[str, bytes]:
    """Returns files of at most a few kilobytes that claim side x side pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]}
    sides = struct.pack("<HH", side, side)
    return {
        "JPEG": _jpeg(side),
        "progressive JPEG": _jpeg(side, b"\xff\xc2", progressive=True),
        "grey JPEG": _jpeg(side, mode="L"),
        "CMYK JPEG": _jpeg(side, mode="CMYK"),
        "JPEG with EXIF": _jpeg(side, exif=exif),
        "PNG": _png(side),
        "animated PNG": _png(side, encode(RED, "PNG", **frames)),
        "GIF": _gif(side),
        "GIF with a larger frame": _gif_with_a_large_frame(side),
        "animated GIF": _gif(side, disposal=2, **frames),
        "BMP": _patched(encode(RED, "BMP"), 18, struct.pack("<ii", side, side)),
        "TIFF": _tiff(side),
        "LZW TIFF": _tiff(side, compression="tiff_lzw"),
        "PPM": b"P6 %d %d 255\n" % (side, side) + bytes(100),
        "WebP": _webp(side),
        "JPEG 2000": _jpeg2000(side),
        "ICO with a larger PNG": _ico(side),
        "TGA": _patched(encode(RED, "TGA"), 12, sides),
        "DDS": _patched(encode(RED, "DDS"), 12, struct.pack("<II", side, side)),
        "QOI": b"qoif" + struct.pack(">IIBB", side, side, 3, 0) + bytes(20),
    }
