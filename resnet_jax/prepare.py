"""Prepares data sets as ArrayRecord, and verifies them.

python -m resnet_jax.prepare imagenet2012 --manual_dir=DIR   the two tar files in DIR
python -m resnet_jax.prepare tfds:NAME[/CONFIG]              the data set's tfds builder
python -m resnet_jax.prepare folder:PATH                     PATH/SPLIT/CLASS/IMAGE.jpg
                                                             or PATH/CLASS/IMAGE.jpg
python -m resnet_jax.prepare convert DIR                     tfds TFRecords in DIR
python -m resnet_jax.prepare verify SOURCE_OR_DIR            lists every damaged image

--max_side=N and --quality=Q make the images smaller once: the longer side becomes at
most N pixels, and the image a JPEG of quality Q (90 if only N is given) with 4:2:0
chroma subsampling.

All commands but tfds:NAME can be interrupted, and the same command resumes the work.
Only tfds:NAME may need TensorFlow (`pip install tensorflow`), with which many builders
extract their archives. Training reads the results without TensorFlow.
"""

import argparse
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from resnet_jax.config.defaults import MAX_PIXELS
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, whole_number
from resnet_jax.errors import UserError
from resnet_jax.paths import check_folder_to_write
from resnet_jax.persistence import storage


def _folder(text: str) -> str:
    # argparse also calls it for the default, the empty text.
    subject = "The data that prepare reads and writes"
    return text and os.fspath(storage.local_path_of(text, subject))


def _folder_to_write(text: str) -> str:
    folder = _folder(text)
    if folder:
        check_folder_to_write(pathlib.Path(folder))
    return folder


# The flags that have no effect on a source or a task.
_UNUSED = {
    "verify": ("manual_dir", "out", "max_side", "quality"),
    "convert": ("manual_dir",),
    "folder": ("manual_dir", "data_dir"),
}


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("prepare", __doc__)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="The data set to prepare, imagenet2012, tfds:NAME or folder:PATH; or the"
        " task for DIRECTORY, convert or verify.",
    )
    parser.add_argument(
        "directory",
        nargs="?",
        default="",
        metavar="DIRECTORY",
        help="The directory that convert reads, or the directory or source that verify"
        " checks. It is required for these two, and the others take none.",
    )
    parser.add_argument(
        "--data_dir",
        type=_folder,
        default="",
        help="The directory in which tfds keeps its data sets. The default is that of"
        " tfds, $TFDS_DATA_DIR or ~/tensorflow_datasets.",
    )
    parser.add_argument(
        "--manual_dir",
        type=_folder,
        default="",
        help="The directory of the archives that you have downloaded yourself. The"
        " default is downloads/manual in --data_dir.",
    )
    parser.add_argument(
        "--out",
        type=_folder_to_write,
        default="",
        help="The directory to write the data set to. The default is a directory in"
        " --data_dir, or beside the folder for folder:PATH.",
    )
    parser.add_argument(
        "--max_side",
        type=whole_number(0),
        default=0,
        help="The largest side of an image in pixels; larger images are resized. The"
        " default of 0 keeps the size of each image.",
    )
    parser.add_argument(
        "--quality",
        type=whole_number(1, 100),
        default=0,
        help="The quality, from 1 to 100, of the JPEGs as which images are encoded"
        " again. The default is 90 with --max_side; otherwise the original files are"
        " kept.",
    )
    parser.add_argument(
        "--max_pixels",
        type=count,
        default=MAX_PIXELS,
        help="The number of pixels beyond which verify, --max_side and --quality do not"
        " decode an image. The default is that of data.max_pixels, %(default)s.",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    parser.add_argument(
        "--num_workers",
        type=count,
        default=cores or os.cpu_count() or 1,
        help="The number of processes that work at the same time. The default is one"
        " per CPU core, %(default)s on this machine.",
    )
    args = parser.parse(arguments)
    if args.source in ("convert", "verify") and not args.directory:
        raise UserError(
            f"{args.source} needs a directory: python -m resnet_jax.prepare"
            f" {args.source} DIRECTORY."
        )
    if args.directory and args.source not in ("convert", "verify"):
        raise UserError(
            f"{args.source} takes no DIRECTORY, but {args.directory!r} was given. Put"
            " quotes around a path with spaces; --out=DIRECTORY names the result."
        )
    for source, flags in _UNUSED.items():
        if args.source == source or args.source.startswith(f"{source}:"):
            parser.warn_of_unused(args, flags, source)
    return args


def main(argv: Sequence[str], **options: Any) -> None:
    """Runs the command, which the module's docstring describes.

    Args:
      argv: The command line.
      **options: Fields of `builders.Options` that have no flag.
    """
    args = vars(_parse(argv[1:]))
    # Imported here, so that --help answers at once.
    from resnet_jax.data.prepare.builders import Options, prepare, split_sizes
    from resnet_jax.data.prepare.pack import Reencode

    # Without a network, urllib3 warns of each of many retries.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    if args["source"] == "verify":
        keys = ("directory", "data_dir", "num_workers", "max_pixels")
        _verify(*(args[key] for key in keys))
        return
    max_side, quality = args.pop("max_side"), args.pop("quality")
    max_pixels, reencode = args.pop("max_pixels"), None
    if max_side or quality:
        reencode = Reencode(max_side, quality or 90, max_pixels)
    path = prepare(Options(reencode=reencode, **args, **options))
    sizes = ", ".join(f"{name} {size:,}" for name, size in split_sizes(path).items())
    output.say(f"{path} is prepared ({sizes} images).")
    output.say(f"Train on it with --config.data.source=tfds:{path}")


def _verify(source: str, data_dir: str, num_workers: int, max_pixels: int) -> None:
    """Prints each problem of a data set; raises UserError if there is any."""
    from resnet_jax.data.prepare.builders import check

    total, left_out, problems = check(source, data_dir, num_workers, max_pixels)
    number = 0
    for problem in problems:
        number += 1
        output.answer(output.one_line(problem))
    others = f" {left_out}." if left_out else ""
    if number:
        word = "problem" if number == 1 else "problems"
        raise UserError(
            f"{source} has {number:,} {word}, listed above; {total:,} images were"
            f" read.{others}"
        )
    output.answer(f"All {total:,} images of {source} are readable.{others}")


def run(argv: Sequence[str], **options: Any) -> None:
    """Runs `main`, and says after an interruption that the command resumes the work.

    Raises:
      UserError: The file system rejected an operation.
    """
    try:
        main(argv, **options)
    except OSError as error:
        # Other errors than those of the file system keep their traceback.
        if error.strerror is None:
            raise
        raise UserError(
            f"{error.filename or 'A file'}: {error.strerror}. Fix that; then the same"
            " command resumes the work."
        ) from None
    except KeyboardInterrupt:
        output.note("Interrupted; the same command resumes the work.")
        raise


if __name__ == "__main__":
    output.command(run)
