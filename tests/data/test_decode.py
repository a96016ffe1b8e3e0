"""Every kind of image file becomes upright RGB or grey pixels, or is named as bad."""

import concurrent.futures
import contextlib
import io
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib

import numpy as np
import pytest
from PIL import AvifImagePlugin, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from resnet_jax.data import decode as decode_module
from resnet_jax.data.augment import Augment
from resnet_jax.data.decode import Picture
from resnet_jax.errors import BadImageError, UserError
from tests.helpers.breakages import BREAKAGES, JPEG, PNG
from tests.helpers.oversized import RED as RED_SQUARE
from tests.helpers.oversized import files_that_claim
from tests.helpers.pictures import BLUE, GREEN, RED, YELLOW, encode, noise, quadrants
from tests.helpers.real_data import real_data

NAME = "some/folder/file.jpg"


def decode(image, channels: int, name: str) -> np.ndarray:
    return Picture(image, channels, name).pixels()


# JPEG rounds colours to YCbCr, and its coefficients to whole numbers. At quality 100,
# without subsampling, in flat blocks, each rounds by at most half a level, and the
# conversion back multiplies by 1.8 at most.
JPEG_BOUND = 3
LOSSLESS_JPEG = {"quality": 100, "subsampling": 0}


def png(width: int, height: int, depth: int, color_type: int, rows: np.ndarray):
    """Returns a PNG file of a kind that Pillow does not write, after the standard."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    filtered = b"".join(b"\0" + row.tobytes() for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(filtered))
        + chunk(b"IEND", b"")
    )


def pixels(image: bytes, channels: int = 3) -> np.ndarray:
    decoded = decode(image, channels, NAME)
    assert decoded.shape[-1] == channels
    return decoded if channels == 3 else decoded[:, :, 0]


def assert_quadrants(decoded: np.ndarray, bound: int = 0):
    expected = np.asarray(quadrants())
    assert decoded.shape == expected.shape
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - expected).max() <= bound


def with_alpha(image: Image.Image) -> Image.Image:
    """Returns an image that is transparent on the left and opaque on the right."""
    alpha = np.linspace(0, 255, image.width).astype(np.uint8)
    image = image.copy()
    image.putalpha(Image.fromarray(np.tile(alpha, (image.height, 1))))
    return image


PALETTE = quadrants().convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
COLOR_FILES = {
    "PNG": encode(quadrants(), "PNG"),
    "PNG with alpha": encode(with_alpha(quadrants()), "PNG"),
    "PNG with a transparent color": encode(quadrants(), "PNG", transparency=RED),
    "palette PNG": encode(PALETTE, "PNG"),
    "palette PNG with a transparent entry": encode(PALETTE, "PNG", transparency=1),
    "palette PNG with alphas": encode(
        PALETTE, "PNG", transparency=bytes([0, 100, 200, 255])
    ),
    "16-bit PNG": png(
        *(48, 32, 16, 2),
        # The low bytes are arbitrary and must not be seen.
        (np.asarray(quadrants()) * np.uint16(256) + np.uint16(127)).astype(">u2"),
    ),
    "GIF": encode(quadrants(), "GIF"),
    "GIF with a transparent entry": encode(PALETTE, "GIF", transparency=1),
    "animated GIF": encode(
        quadrants(), "GIF", save_all=True, append_images=[noise(0, 48, 32)]
    ),
    "BMP": encode(quadrants(), "BMP"),
    "TIFF": encode(quadrants(), "TIFF"),
    "LZW TIFF": encode(quadrants(), "TIFF", compression="tiff_lzw"),
    "PPM": encode(quadrants(), "PPM"),
    "WebP": encode(quadrants(), "WEBP", lossless=True),
    "WebP with alpha": encode(
        with_alpha(quadrants()), "WEBP", lossless=True, exact=True
    ),
}


# Pillow warns of some transparent palettes.
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", COLOR_FILES)
def test_lossless_color_files_give_their_colors(kind):
    assert_quadrants(pixels(COLOR_FILES[kind]))


def test_a_color_jpeg_gives_its_colors():
    jpeg = encode(quadrants(), "JPEG", **LOSSLESS_JPEG)
    assert_quadrants(pixels(jpeg), JPEG_BOUND)


def test_a_progressive_jpeg_gives_its_colors():
    jpeg = encode(quadrants(), "JPEG", progressive=True, **LOSSLESS_JPEG)
    assert_quadrants(pixels(jpeg), JPEG_BOUND)


def test_a_cmyk_jpeg_gives_its_colors():
    jpeg = encode(quadrants().convert("CMYK"), "JPEG", **LOSSLESS_JPEG)
    # Inverted as by Photoshop, as the Adobe segment says. ImageNet has 22 such files.
    assert b"Adobe" in jpeg
    assert_quadrants(pixels(jpeg), JPEG_BOUND)


def test_a_grey_jpeg_has_three_equal_channels():
    grey = Image.new("L", (40, 24), 77)
    decoded = pixels(encode(grey, "JPEG", quality=100))
    assert decoded.shape == (24, 40, 3)
    assert (np.abs(decoded.astype(int) - 77) <= 1).all()
    assert (decoded == decoded[:, :, :1]).all()


RAMP = np.arange(12 * 8, dtype=np.uint8).reshape(8, 12)
BITS = RAMP % 3 == 0
GREY_FILES = {
    "PNG": (encode(Image.fromarray(RAMP), "PNG"), RAMP),
    "PNG with a transparent grey": (
        encode(Image.fromarray(RAMP), "PNG", transparency=5),
        RAMP,
    ),
    "PNG with alpha": (encode(with_alpha(Image.fromarray(RAMP)), "PNG"), RAMP),
    "1-bit PNG": (encode(Image.fromarray(BITS), "PNG"), BITS * np.uint8(255)),
    "1-bit TIFF": (encode(Image.fromarray(BITS), "TIFF"), BITS * np.uint8(255)),
    "GIF": (encode(Image.fromarray(RAMP), "GIF"), RAMP),
    "BMP": (encode(Image.fromarray(RAMP), "BMP"), RAMP),
    "PGM": (encode(Image.fromarray(RAMP), "PPM"), RAMP),
    "TIFF": (encode(Image.fromarray(RAMP), "TIFF"), RAMP),
}


@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("kind", GREY_FILES)
def test_lossless_grey_files_give_their_greys(kind, channels):
    file, expected = GREY_FILES[kind]
    decoded = pixels(file, channels)
    if channels == 3:
        expected = np.repeat(expected[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("kind", ("PNG", "TIFF", "PPM", "PNG with alpha"))
def test_16_bits_are_scaled_not_clipped(kind):
    deep = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    if kind == "PNG with alpha":
        grey_and_alpha = np.stack([deep, deep[:, ::-1]], axis=-1).astype(">u2")
        file = png(*(5, 1, 16, 4), grey_and_alpha)
    else:
        file = encode(Image.fromarray(deep), kind)
    np.testing.assert_array_equal(pixels(file, 1), [[0, 0, 1, 128, 255]])


def test_color_files_become_grey_for_one_channel():
    # The weights of ITU-R 601: 0.299 red, 0.587 green, 0.114 blue.
    greys = {RED: 76, GREEN: 150, BLUE: 29, YELLOW: 226}
    for kind, file in COLOR_FILES.items():
        decoded = pixels(file, 1)
        corners = decoded[0, 0], decoded[0, -1], decoded[-1, 0], decoded[-1, -1]
        assert corners == tuple(greys.values()), kind


# The stored picture for each value of the tag. The comments give the sides of the
# upright picture that are its first row and its first column (Exif 2.3, 4.6.4 A).
STORED = {
    1: lambda upright: upright,  # top, left
    2: lambda upright: upright[:, ::-1],  # top, right
    3: lambda upright: upright[::-1, ::-1],  # bottom, right
    4: lambda upright: upright[::-1],  # bottom, left
    5: lambda upright: upright.swapaxes(0, 1),  # left, top
    6: lambda upright: upright[:, ::-1].swapaxes(0, 1),  # right, top
    7: lambda upright: upright[::-1, ::-1].swapaxes(0, 1),  # right, bottom
    8: lambda upright: upright[::-1].swapaxes(0, 1),  # left, bottom
}


def oriented(orientation: int) -> tuple[Image.Image, Image.Exif]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = STORED.get(orientation, STORED[1])(np.asarray(quadrants()))
    return Image.fromarray(np.ascontiguousarray(stored)), exif


@pytest.mark.parametrize("orientation", STORED)
def test_every_exif_orientation_ends_upright(orientation):
    stored, exif = oriented(orientation)
    jpeg = encode(stored, "JPEG", exif=exif, **LOSSLESS_JPEG)
    assert_quadrants(pixels(jpeg), JPEG_BOUND)


@pytest.mark.parametrize("kind", ("PNG", "WEBP", "TIFF"))
def test_exif_orientation_is_applied_in_other_formats_too(kind):
    stored, exif = oriented(6)
    options = {"lossless": True} if kind == "WEBP" else {}
    assert_quadrants(pixels(encode(stored, kind, exif=exif, **options)))


@pytest.mark.parametrize("orientation", (0, 9, 65535))
def test_an_exif_orientation_that_does_not_exist_is_ignored(orientation):
    stored, exif = oriented(orientation)
    jpeg = encode(stored, "JPEG", exif=exif, **LOSSLESS_JPEG)
    assert_quadrants(pixels(jpeg), JPEG_BOUND)
    # Pillow decodes such files, which would change the pixels of runs otherwise.
    assert_quadrants(Picture(jpeg, 3).pixels(shrink=2), JPEG_BOUND)


# Pillow may warn of the EXIF block.
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ("JPEG", "PNG", "WEBP"))
@pytest.mark.parametrize(
    "exif",
    (
        b"Exif\0\0",
        b"Exif\0\0junk that is no TIFF header",
        b"Exif\0\0MM\0*",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        # One entry, whose value lies after the end of the block.
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\0\0\xff\xff\0\0",
    ),
)
def test_a_corrupt_exif_block_does_not_make_the_pixels_bad(exif, kind):
    if kind == "JPEG":
        image = encode(quadrants(), kind, exif=exif, **LOSSLESS_JPEG)
    else:
        image = encode(quadrants(), kind, exif=exif, lossless=True)
    assert_quadrants(pixels(image), JPEG_BOUND if kind == "JPEG" else 0)


def test_an_image_is_upright_even_if_its_exif_block_cannot_be_rewritten():
    stored, exif = oriented(6)
    # A text in place of numbers: Pillow fails on it after it has turned the image.
    exif[0x010F] = "maker"
    block = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x45\x00\x02")
    jpeg = encode(stored, "JPEG", exif=block, **LOSSLESS_JPEG)
    opened = Image.open(io.BytesIO(jpeg))
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(opened)
    assert_quadrants(pixels(jpeg), JPEG_BOUND)
    assert_quadrants(Picture(opened, 3).pixels(), JPEG_BOUND)


def with_xmp(stored: Image.Image, kind: str, text: str) -> bytes:
    """Returns an image file whose metadata are XMP alone."""
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{text}</x:xmpmeta>'
    match kind:
        case "PNG":
            metadata = PngInfo()
            metadata.add_itxt("XML:com.adobe.xmp", xmp)
            return encode(stored, kind, pnginfo=metadata)
        case "TIFF":
            return encode(stored, kind, tiffinfo={700: xmp.encode()})
        case "WEBP":
            return encode(stored, kind, xmp=xmp.encode(), lossless=True)
        case "JPEG":
            return encode(stored, kind, xmp=xmp.encode(), **LOSSLESS_JPEG)
        case _:
            options = {"quality": 100, "subsampling": "4:4:4"}
            return encode(stored, kind, xmp=xmp.encode(), **options)


XMP_KINDS = ("JPEG", "PNG", "TIFF", "WEBP", "AVIF")


@pytest.mark.parametrize("kind", XMP_KINDS)
@pytest.mark.parametrize("stored_mode", ("RGB", "L"))
@pytest.mark.parametrize("channels", (1, 3))
def test_an_orientation_given_in_xmp_alone_ends_upright(kind, stored_mode, channels):
    upright = quadrants() if (stored_mode, channels) == ("RGB", 3) else None
    upright = upright or quadrants().convert("L").convert("RGB")
    expected = np.asarray(upright)[:, :, :channels].astype(int)
    for orientation in STORED:
        stored = oriented(orientation)[0].convert(stored_mode)
        for text in (
            f'<rdf:Description tiff:Orientation="{orientation}"/>',
            f"<tiff:Orientation>{orientation}</tiff:Orientation>",
        ):
            file = with_xmp(stored, kind, text)
            picture = Picture(file, channels, NAME)
            # AV1 has coarser colours than JPEG at its best quality.
            bound = {"JPEG": JPEG_BOUND, "AVIF": 6}.get(kind, 0)
            assert picture.size == (48, 32)
            assert np.abs(picture.pixels() - expected).max() <= bound, orientation
            part = Picture(file, channels).part(3, 4, 20, 30)
            np.testing.assert_array_equal(part, picture.pixels()[4:30, 3:20])
            opened = Picture(Image.open(io.BytesIO(file)), channels)
            np.testing.assert_array_equal(opened.pixels(), picture.pixels())


@pytest.mark.parametrize("channels", (1, 3))
def test_exif_comes_before_xmp(channels):
    stored, exif = oriented(6)
    xmp = b'<rdf:Description tiff:Orientation="3"/>'
    jpeg = encode(stored, "JPEG", exif=exif, xmp=xmp, **LOSSLESS_JPEG)
    assert Picture(jpeg, channels).pixels().shape[:2] == (32, 48)
    stored, exif = oriented(1)
    jpeg = encode(stored, "JPEG", exif=exif, xmp=xmp, **LOSSLESS_JPEG)
    np.testing.assert_array_equal(
        Picture(jpeg, channels).pixels(),
        Picture(encode(stored, "JPEG", **LOSSLESS_JPEG), channels).pixels(),
    )


@pytest.mark.parametrize("channels", (1, 3))
def test_arrays_keep_their_pixels(channels):
    array = np.asarray(noise(0, 9, 7))[:, :, :channels]
    decoded = decode(array, channels, NAME)
    np.testing.assert_array_equal(
        np.asarray(decoded).reshape(array.shape), array, strict=True
    )


def test_arrays_are_converted_between_grey_and_color():
    grey = RAMP[:, :, None]
    assert (np.asarray(decode(grey, 3, NAME)) == grey).all()
    assert np.asarray(decode(np.full((2, 2, 3), 9, np.uint8), 1, NAME)).max() == 9


# The offset of the width: after the signature (8 bytes), and the length and kind of the
# first chunk (8 bytes).
PNG_WIDTH = 16
# The offset of the height: the frame header of a baseline JPEG is a marker (2 bytes), a
# length (2), a depth (1) and the height (2).
JPEG_HEIGHT = JPEG.index(b"\xff\xc0") + 5
BROKEN = {
    "empty": b"",
    "one byte": b"\xff",
    "truncated JPEG": JPEG[: len(JPEG) // 2],
    "JPEG without its last byte": JPEG[:-1],
    "JPEG header alone": JPEG[:100],
    "JPEG of height zero": JPEG[:JPEG_HEIGHT] + b"\0\0" + JPEG[JPEG_HEIGHT + 2 :],
    "truncated PNG": PNG[: len(PNG) // 2],
    "PNG header alone": PNG[:33],
    "PNG with a corrupt header": PNG[:PNG_WIDTH] + b"abcd" + PNG[PNG_WIDTH + 4 :],
    "PNG of width zero": png(0, 4, 8, 0, np.zeros((4, 0), np.uint8)),
    "PNG of height zero": png(4, 0, 8, 0, np.zeros((0, 4), np.uint8)),
    "PNG without pixels": png(4, 4, 8, 0, np.zeros((0, 4), np.uint8)),
    # As RGB it would take 12 GB, which must not be allocated.
    "PNG of 4 gigapixels": png(65535, 65535, 8, 0, np.zeros((1, 65535), np.uint8)),
    "text": b"This is not an image.\n" * 50,
    "HTML error page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "random bytes": np.random.default_rng(0).bytes(5000),
    "truncated GIF": encode(noise(0, 60, 40), "GIF")[:1500],
    "truncated BMP": encode(noise(0, 60, 40), "BMP")[:-50],
    "truncated TIFF": encode(noise(0, 60, 40), "TIFF")[:-50],
    "truncated WebP": encode(noise(0, 60, 40), "WEBP")[:-50],
}


@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_an_error_that_names_it(kind, channels):
    with pytest.raises(BadImageError, match=NAME) as raised:
        decode(BROKEN[kind], channels, NAME)
    # The command line prints it as one sentence without a traceback.
    assert isinstance(raised.value, UserError)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(".")


@pytest.mark.parametrize("kind", ("JPEG", "PNG"))
def test_a_truncated_file_is_always_an_error(kind):
    file = JPEG if kind == "JPEG" else PNG
    # After the last pixel, a PNG has two checksums (4 + 4) and an empty chunk (12).
    whole = len(file) - (0 if kind == "JPEG" else 20)
    # Tries every 7th length, and the longest that are too short.
    for length in [*range(0, whole, 7), *range(whole - 5, whole)]:
        with pytest.raises(BadImageError):
            decode(file[:length], 3, NAME)


# Pillow warns of such files.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"))
def test_a_broken_file_gives_an_image_or_a_bad_image_error(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {} if kind in ("GIF", "BMP") else {"exif": exif}
    file = encode(noise(0, 60, 40), kind, **options)
    rng = np.random.default_rng(0)
    decoded = bad = 0
    for _ in range(20):
        for breakage in BREAKAGES:
            broken = breakage(file, rng)
            try:
                image = decode(broken, 3, NAME)
            except BadImageError as error:
                assert str(error).startswith(NAME)
                bad += 1
            else:
                assert image.shape[-1] == 3
                assert image.size > 0
                assert image.dtype == np.uint8
                decoded += 1
    # Some breakages leave an image, and others do not.
    assert decoded > 0
    assert bad > 0


def test_all_300_imagenet_samples_are_decoded_and_cropped():
    crops = (
        Augment(size=224, crop="random_resized", flip=True),
        Augment(size=224),
    )
    grey = 0
    with zipfile.ZipFile(real_data("imagenet-samples.zip")) as archive:
        names = [name for name in archive.namelist() if name.endswith(".JPEG")]
        for index, name in enumerate(names):
            with warnings.catch_warnings(action="error"):
                image = decode(archive.read(name), 3, name)
            grey += bool((image == image[:, :, :1]).all())
            for crop in crops:
                result = crop(Picture(image, 3), index)
                assert result.shape == (224, 224, 3)
                assert result.dtype == np.uint8
                # A photograph is not of one colour, unlike a failed decoding.
                assert result.std() > 5, name
    assert len(names) == 300
    # Some samples are grey, as data/README.md says.
    assert 1 <= grey <= 30


@pytest.mark.parametrize("shrink", (2, 4))
def test_jpegs_can_be_decoded_smaller_and_other_files_only_at_full_size(shrink):
    image = noise(0, 12, 9).resize((104, 72), Image.Resampling.BICUBIC)
    whole = Picture(encode(image, "JPEG", quality=95), 3)
    small = whole.pixels(shrink)
    assert whole.size == (104, 72)
    assert small.shape == (72 // shrink, 104 // shrink, 3)
    boxes = image.reduce(shrink)
    # The decoder drops high frequencies, which is nearly a mean over boxes.
    assert np.abs(small.astype(int) - np.asarray(boxes)).mean() < 4
    assert Picture(encode(image, "PNG"), 3).pixels(shrink).shape == (72, 104, 3)


def test_the_pixels_of_jpegs_are_those_of_pillow():
    for quality, subsampling in ((75, "4:2:0"), (90, "4:4:4"), (95, "4:2:2")):
        jpeg = encode(
            noise(1, 61, 47), "JPEG", quality=quality, subsampling=subsampling
        )
        expected = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        np.testing.assert_array_equal(Picture(jpeg, 3).pixels(), expected)


JPEG_KINDS = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "coarse": {"quality": 20},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 3},
}


@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("mode", ("L", "RGB", "CMYK"))
@pytest.mark.parametrize("library", ("nvimgcodec", "none"))
def test_a_part_has_the_pixels_of_the_complete_image(kind, mode, library, monkeypatch):
    if library == "none":
        # As where the package is not installed, which no argument can say.
        monkeypatch.setattr(decode_module, "nvimgcodec", None)
    image = noise(1, 31, 23).resize((250, 187), Image.Resampling.BICUBIC)
    jpeg = encode(image.convert(mode), "JPEG", **JPEG_KINDS[kind])
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        whole = decode(jpeg, channels, NAME)
        for _ in range(10):
            left, right = sorted(rng.choice(251, 2, replace=False).tolist())
            top, bottom = sorted(rng.choice(188, 2, replace=False).tolist())
            part = Picture(jpeg, channels).part(left, top, right, bottom)
            np.testing.assert_array_equal(part, whole[top:bottom, left:right])


class OnlyParts(Picture):
    """A picture that is never decoded as a whole."""

    def pixels(self, shrink: int = 1) -> np.ndarray:
        raise AssertionError("the whole picture is decoded")


def test_a_part_is_decoded_without_the_rest():
    pytest.importorskip("nvidia.nvimgcodec")
    jpeg = encode(noise(1, 31, 23), "JPEG")
    assert OnlyParts(jpeg, 3).part(2, 3, 20, 10).shape == (7, 18, 3)


def test_a_part_of_a_truncated_file_is_an_error_even_if_its_bytes_are_there():
    jpeg = encode(noise(1, 310, 230), "JPEG")[:-2000]
    with pytest.raises(BadImageError, match="truncated"):
        Picture(jpeg, 3, NAME).part(0, 0, 20, 20)


def test_importing_the_decoder_prints_nothing_about_missing_libraries():
    done = subprocess.run(
        [sys.executable, "-c", "import resnet_jax.data.decode"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")


LARGE = files_that_claim(30000)


# Pillow warns of such files.
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("kind", LARGE)
def test_a_file_that_claims_too_many_pixels_is_an_error_with_the_way_out(
    kind, channels
):
    for use in (Picture.pixels, lambda picture: picture.size):
        with pytest.raises(BadImageError, match=f"^{NAME} claims .*pixels, ") as raised:
            use(Picture(LARGE[kind], channels, NAME))
        message = str(raised.value)
        assert "more than data.max_pixels=178956970;" in message
        pixels = int(message.split(" pixels")[0].split()[-1].replace(",", ""))
        assert pixels == (16383**2 if kind == "WebP" else 900_000_000)
        assert f"--config.data.max_pixels={pixels} " in message


@pytest.mark.parametrize("mode", ("RGB", "L", "P"))
@pytest.mark.parametrize(
    "kind", ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "JPEG2000", "TGA")
)
def test_an_image_of_exactly_the_limit_is_decoded(kind, mode):
    try:
        file = encode(noise(0, 30, 20).convert(mode), kind)
    except OSError:
        pytest.skip(f"{kind} has no mode {mode}")
    for channels in (1, 3):
        at_limit = Picture(file, channels, NAME, max_pixels=600)
        assert at_limit.size == (30, 20)
        assert at_limit.pixels().shape == (20, 30, channels)
        beyond = Picture(file, channels, NAME, max_pixels=599)
        for use in (Picture.pixels, lambda picture: picture.part(0, 0, 2, 2)):
            with pytest.raises(BadImageError, match="600 pixels, more than data"):
                use(beyond)


@pytest.mark.filterwarnings("error")
def test_the_limit_does_not_depend_on_the_limit_that_a_user_gave_pillow(monkeypatch):
    files = [encode(noise(0, 30, 20), kind) for kind in ("PNG", "GIF", "WEBP", "TIFF")]
    # Below 300 Pillow would raise an error, and below 600 print a warning.
    for limit in (100, 500, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        for file in files:
            assert Picture(file, 3).pixels().shape == (20, 30, 3)
            with pytest.raises(BadImageError, match="600 pixels, more than"):
                Picture(file, 3, max_pixels=599).pixels()
        assert limit == Image.MAX_IMAGE_PIXELS


def test_threads_with_other_limits_do_not_disturb_each_other():
    png, before = encode(noise(0, 300, 200), "PNG"), Image.MAX_IMAGE_PIXELS

    def decode_some(limit: int) -> set[bool]:
        results = set()
        for _ in range(50):
            try:
                Picture(png, 3, max_pixels=limit).pixels()
                results.add(True)
            except BadImageError:
                results.add(False)
        return results

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        limits = [60_000, 59_999] * 4
        results = list(pool.map(decode_some, limits))
    assert results == [{limit == 60_000} for limit in limits]
    assert before == Image.MAX_IMAGE_PIXELS


LIMITED = """
import pathlib, resource, sys
from resnet_jax.data.decode import Picture
from resnet_jax.errors import UserError
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * 4096
limit = used + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[2:]:
    for channels in (1, 3):
        try:
            Picture(pathlib.Path(path).read_bytes(), channels, path).pixels()
        except UserError as error:
            print(error)
"""


def decode_in(memory: int, files: dict[str, bytes], folder) -> str:
    """Decodes files in a process that can take so much memory; returns its output."""
    paths = [folder / f"{number}.img" for number in range(len(files))]
    for path, content in zip(paths, files.values(), strict=True):
        path.write_bytes(content)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(memory), *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_files_that_claim_too_much_take_no_memory(tmp_path):
    output = decode_in(64 * 2**20, LARGE, tmp_path).splitlines()
    assert len(output) == 2 * len(LARGE)
    for line in output:
        assert "more than data.max_pixels" in line


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_too_little_memory_is_an_error_that_names_the_image(tmp_path):
    kinds = ("JPEG", "PNG", "TIFF", "GIF")
    files = {kind: files_that_claim(12000)[kind] for kind in kinds}
    output = decode_in(64 * 2**20, files, tmp_path).splitlines()
    assert len(output) == 2 * len(files)
    for number in range(len(files)):
        for line in output[2 * number : 2 * number + 2]:
            assert line.startswith(f"{tmp_path}/{number}.img: there is too little")


def decompressed(kind: bytes) -> bytes:
    """Returns a PNG with a compressed chunk of 500 MB, which is not of pixels."""
    data = b"k\0\0" + zlib.compress(bytes(500_000_000), 1)
    chunk = struct.pack(">I", len(data)) + kind + data
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return PNG[:33] + chunk + checksum + PNG[33:]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_texts_and_profiles_take_little_memory(tmp_path):
    files = {kind: decompressed(kind) for kind in (b"zTXt", b"iCCP")}
    output = decode_in(64 * 2**20, files, tmp_path)
    assert output.count("cannot be decoded: Decompressed data too large") == 4


def test_heic_is_decoded_or_the_message_names_the_missing_package():
    # The brands of an iPhone's files, and of others.
    for brands in (b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic", b"heix\0\0\0\0"):
        start = struct.pack(">I", len(brands) + 8) + b"ftyp" + brands
        with pytest.raises(BadImageError, match=r"pillow-heif|not a complete HEIC"):
            decode(start + bytes(50), 3, NAME)
    pillow_heif = pytest.importorskip("pillow_heif")
    image = quadrants()
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=-1, chroma=444)
    # HEVC rounds colours as JPEG does.
    assert_quadrants(pixels(file.getvalue()), 2 * JPEG_BOUND)
    with pytest.raises(BadImageError, match=r"1,536 pixels, more than data\.max"):
        Picture(file.getvalue(), 3, NAME, max_pixels=1535).pixels()


def test_postscript_is_not_handed_to_another_program():
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n"
    with pytest.raises(BadImageError, match="not an image in a known format"):
        decode(program, 3, NAME)


@pytest.mark.filterwarnings("error")
def test_a_format_that_this_build_of_pillow_cannot_read_is_named(monkeypatch):
    file = encode(RED_SQUARE, "AVIF")
    # As in a build without the library, which no argument can say.
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    with pytest.raises(BadImageError, match="AVIF support not installed"):
        decode(file, 3, NAME)


def every_format() -> dict[tuple[str, str], bytes]:
    """Returns files of all formats and modes that Pillow can write."""
    Image.init()
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100)
    files = {}
    # ICNS and PDF files are large, and Pillow does not read PDF.
    for kind in sorted(Image.SAVE.keys() - {"ICNS", "PDF"}):
        for mode in ("RGB", "L", "P", "1", "CMYK", "I;16", "F"):
            image = deep if mode == "I;16" else noise(0, 30, 20).convert(mode)
            with contextlib.suppress(OSError, ValueError, KeyError, RuntimeError):
                files[kind, mode] = encode(image, kind)
    for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        files["TIFF", name] = encode(noise(0, 30, 20), "TIFF", compression=name)
    frames = {"save_all": True, "append_images": [noise(1, 30, 20)]}
    for kind in ("GIF", "PNG", "TIFF", "WEBP", "MPO", "AVIF"):
        files[kind, "animated"] = encode(noise(0, 30, 20), kind, **frames)
    return files


# Pillow warns of such files.
@pytest.mark.filterwarnings("ignore")
def test_a_broken_file_of_any_format_is_decoded_or_an_error_that_names_it():
    rng = np.random.default_rng(0)
    formats, decoded, bad = set(), 0, 0
    for (kind, _), file in every_format().items():
        formats.add(kind)
        for breakage in BREAKAGES:
            broken = breakage(file, rng)
            for channels in (1, 3):
                picture = Picture(broken, channels, NAME, max_pixels=10_000)
                try:
                    image = picture.pixels()
                except BadImageError as error:
                    assert str(error).startswith(NAME)
                    assert "\n" not in str(error)
                    bad += 1
                else:
                    assert image.shape[-1] == channels
                    assert 0 < image.size <= 10_000 * channels
                    decoded += 1
    assert len(formats) > 15
    assert min(decoded, bad) > 100


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_metadata_are_no_warning_for_users(tmp_path, kind):
    damaged = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"
    Image.new("RGB", (8, 8)).save(tmp_path / "a", kind, exif=damaged)
    program = (
        "import pathlib, sys; from resnet_jax.data.decode import Picture;"
        " print(Picture(pathlib.Path(sys.argv[1]).read_bytes(), 1).pixels().shape)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("(8, 8, 1)\n", "")
