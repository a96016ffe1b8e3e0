"""Image files in folders: which files are images, and how many others there are."""

import mimetypes
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from resnet_jax.errors import UserError

# The suffixes of what Pillow reads, and of HEIC. Left out are formats that Pillow only
# recognises (HDF5, GRIB, BUFR, WMF, MPEG), and PostScript, for which it runs another
# program. The list does not follow the installed Pillow, so that the images of a folder
# are the same everywhere.
SUFFIXES = frozenset(
    (
        *(".apng", ".avif", ".avifs", ".blp", ".bmp", ".bw", ".cur", ".dcx", ".dds"),
        *(".dib", ".fit", ".fits", ".flc", ".fli", ".ftc", ".ftu", ".gbr", ".gif"),
        *(".heic", ".heics", ".heif", ".heifs", ".hif"),
        *(".icb", ".icns", ".ico", ".iim", ".im", ".j2c"),
        *(".j2k", ".jfif", ".jp2", ".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx"),
        *(".mpo", ".msp", ".pbm", ".pcd", ".pcx", ".pfm", ".pgm", ".png", ".pnm"),
        *(".ppm", ".psd", ".pxr", ".qoi", ".ras", ".rgb", ".rgba", ".sgi", ".tga"),
        *(".tif", ".tiff", ".vda", ".vst", ".webp", ".xbm", ".xpm"),
    )
)
# The first bytes of the formats in which images are passed around, for files whose
# names say nothing. TIFF is not among them, since cameras' raw files begin like it.
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|RIFF.{4}WEBP"
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"
    rb"|.{4}ftyp(avi[fs]|hei[cxms]|hev[cx]|mif1|msf1)",
    re.DOTALL,
)
# Suffixes that say that a file is of another kind, so that it need not be opened. The
# tables of the system are not read, so that the images are the same everywhere.
_OTHER_TYPES = mimetypes.MimeTypes()
_OTHER_SUFFIXES = frozenset(
    {
        *(
            suffix
            for suffix, kind in _OTHER_TYPES.types_map[True].items()
            if kind != "application/octet-stream"
        ),
        *_OTHER_TYPES.encodings_map,
        # Unfinished and superseded files.
        *(".bak", ".crdownload", ".orig", ".part", ".partial", ".tmp"),
    }
)
# What operating systems put beside the files of a user, in lower case, and the lock of
# a copy from an object store (`storage.kept_copy`).
_LITTER = frozenset(
    {".ds_store", "thumbs.db", "desktop.ini", "__macosx", "@eadir", ".lock"}
)
# The number of kinds of files that a message names.
MOST_KINDS = 5


class Images(NamedTuple):
    """The images below a folder.

    Attributes:
      paths: Their paths below the folder.
      left_out: The number of other files by kind, such as `.txt` or `hidden`.
    """

    paths: list[str]
    left_out: Counter[str]


def kind_of_other(path: str | os.PathLike[str]) -> str:
    """Returns the kind of a file that is not an image; an empty string for an image.

    A file is opened only if its suffix is unknown.
    """
    name = os.path.basename(path)
    if name.startswith("."):
        return "hidden"
    if not os.path.exists(path):
        return "broken link"
    # Opening a pipe would wait for somebody to write into it.
    if not os.path.isfile(path):
        return "not a regular file"
    if _has_suffix(name):
        return ""
    suffix = os.path.splitext(name)[1].lower()
    if suffix not in _OTHER_SUFFIXES and not suffix.endswith("~"):
        try:
            with open(path, "rb") as file:
                start = file.read(32)
        except OSError:
            return "unreadable"
        if starts_as_image(start):
            return ""
    if not suffix:
        return "no suffix"
    return suffix if re.fullmatch(r"\.\w{1,12}", suffix) else "other suffix"


def starts_as_image(start: bytes) -> bool:
    """Returns whether the first 32 bytes of a file are those of a common format."""
    return _MAGIC.match(start) is not None


def _has_suffix(name: str) -> bool:
    """Returns whether a file that is not hidden has the suffix of an image."""
    return name[name.rfind(".") :].lower() in SUFFIXES and name[0] != "."


def find_images(folder: str | os.PathLike[str]) -> Images:
    """Returns the images in a folder and in its subfolders, in torchvision's order.

    Links are followed, unless they lead back to a folder around them. Hidden folders
    are skipped, and so is what operating systems put there, which is not counted.

    Raises:
      UserError: A folder cannot be read.
    """
    folder = os.fspath(folder)
    found: list[tuple[str, list[str]]] = []
    left_out: Counter[str] = Counter()
    # Each folder with the real paths of itself and of the folders that led there by
    # links.
    waiting: list[tuple[str, tuple[str, ...]]] = [("", (os.path.realpath(folder),))]
    while waiting:
        below, trail = waiting.pop()
        names = []
        for entry in entries_of(os.path.join(folder, below) if below else folder):
            name = entry.name
            # Most files are found to be images here, without asking the disk.
            if entry.is_file(follow_symlinks=False) and _has_suffix(name):
                names.append(name)
            elif not is_folder(entry):
                if kind := kind_of_other(entry.path):
                    left_out[kind] += 1
                else:
                    names.append(name)
            elif name.startswith("."):
                left_out["hidden"] += 1
            elif not entry.is_symlink():
                real = (*trail[:-1], os.path.join(trail[-1], name))
                waiting.append((os.path.join(below, name), real))
            elif any(leads_back(entry.path, real) for real in trail):
                left_out["link to a folder around it"] += 1
            else:
                real = (*trail, os.path.realpath(entry.path))
                waiting.append((os.path.join(below, name), real))
        found.append((below, sorted(names)))
    paths = [
        f"{below}/{name}" if below else name
        for below, names in sorted(found)
        for name in names
    ]
    return Images(paths, left_out)


def count_images(folder: str | os.PathLike[str]) -> int:
    """Returns the number of images in a folder, without those in its subfolders.

    Raises:
      UserError: The folder cannot be read.
    """
    return sum(
        not is_folder(entry) and not kind_of_other(entry.path)
        for entry in entries_of(folder)
    )


def entries_of(folder: str | os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    """Yields the files and folders in a folder, in any order, without litter.

    Raises:
      UserError: The folder cannot be read.
    """
    try:
        with os.scandir(os.fspath(folder)) as entries:
            for entry in entries:
                name = entry.name
                if name.lower() not in _LITTER and not name.startswith("._"):
                    yield entry
    except OSError as error:
        raise UserError(
            f"The folder {os.fspath(folder)} cannot be read: {error.strerror}."
        ) from None


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry is a folder or a link to one."""
    # `DirEntry.is_dir` raises an error for a link to itself.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def leads_back(link: str, folder: str | os.PathLike) -> bool:
    """Returns whether a link leads to a folder, given its real path, or around it."""
    target = os.path.realpath(link)
    return os.path.commonpath([target, folder]) == target


def describe(left_out: Counter[str]) -> str:
    """Returns a clause on files that were left out; an empty string if there are none.

    Args:
      left_out: The number of files by kind; the clause names the most frequent ones.
    """
    if not left_out:
        return ""
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:MOST_KINDS]
    parts = [f"{kind}: {count:,}" for kind, count in most]
    if others := left_out.total() - sum(count for _, count in most):
        parts.append(f"other kinds: {others:,}")
    files = "1 file is" if left_out.total() == 1 else f"{left_out.total():,} files are"
    return f"{files} left out ({', '.join(parts)})"
