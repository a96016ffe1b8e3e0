"""Prepares data sets as ArrayRecord, and verifies them.

python -m resnet_jax.prepare imagenet2012 --manual_dir=DIR   from its two tar files
python -m resnet_jax.prepare tfds:NAME[/CONFIG]              with the builder of tfds
python -m resnet_jax.prepare folder:PATH                     PATH/SPLIT/CLASS/IMAGE.jpg
python -m resnet_jax.prepare convert DIR                     TFRecords of tfds
python -m resnet_jax.prepare verify SOURCE_OR_DIR            lists what is wrong

--max_side=N and --quality=Q make the images smaller, once: the longer side becomes at
most N pixels, and the image a JPEG of quality Q (90 if only N is given), 4:2:0.

Everything but tfds:NAME can be interrupted: the same command resumes it. tfds:NAME is
also the one that may need TensorFlow (`pip install tensorflow`), with which many
builders extract their archives. Training reads the results without it.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count
from resnet_jax.errors import UserError


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser("prepare", __doc__)
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="What is prepared: imagenet2012, tfds:NAME or folder:PATH; or what is"
        " done with a directory: convert or verify.",
    )
    parser.add_argument(
        "directory",
        nargs="?",
        default="",
        metavar="DIRECTORY",
        help="The directory that convert reads, or the directory or source that verify"
        " reads.",
    )
    parser.add_argument(
        "--data_dir",
        default="",
        help="The directory in which tfds keeps its data sets. The default is tfds's"
        " own, $TFDS_DATA_DIR or ~/tensorflow_datasets.",
    )
    parser.add_argument(
        "--manual_dir",
        default="",
        help="The directory of archives that you have downloaded yourself. The default"
        " is downloads/manual in --data_dir.",
    )
    parser.add_argument(
        "--out",
        default="",
        help="The directory that is made. The default is in --data_dir, or beside a"
        " folder.",
    )
    parser.add_argument(
        "--max_side",
        type=int,
        default=0,
        help="The longest side of an image in pixels: larger images are made smaller."
        " The default of 0 leaves them as they are.",
    )
    parser.add_argument(
        "--quality",
        type=int,
        default=0,
        help="The quality of the JPEGs, from 1 to 100, to which images are encoded"
        " again. The default is 90 with --max_side, and otherwise the original files.",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    parser.add_argument(
        "--num_workers",
        type=count,
        default=cores or os.cpu_count() or 1,
        help="The number of processes. The default is one per core, %(default)s here.",
    )
    args = parser.parse(arguments)
    if args.source in ("convert", "verify") and not args.directory:
        raise UserError(
            f"{args.source} needs a directory: python -m resnet_jax.prepare"
            f" {args.source} DIRECTORY."
        )
    return args


def main(argv: Sequence[str], **options: Any) -> None:
    """Runs the command; see the module's docstring.

    Args:
      argv: The command line.
      options: Fields of `builders.Options` that have no flag.
    """
    args = vars(_parse(argv[1:]))
    # Imported here, so that --help answers at once.
    from resnet_jax.data.prepare.builders import Options, prepare, split_sizes
    from resnet_jax.data.prepare.pack import Reencode

    # It warns of each of many retries where there is no network.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    if args["source"] == "verify":
        _verify(args["directory"], args["data_dir"], args["num_workers"])
        return
    max_side, quality = args.pop("max_side"), args.pop("quality")
    reencode = Reencode(max_side, quality or 90) if max_side or quality else None
    path = prepare(Options(reencode=reencode, **args, **options))
    sizes = ", ".join(f"{name} {size:,}" for name, size in split_sizes(path).items())
    output.say(f"{path} is prepared ({sizes} images).")
    output.say(f"Train on it with --config.data.source=tfds:{path}")


def _verify(source: str, data_dir: str, num_workers: int) -> None:
    """Prints what is wrong with a data set; raises UserError if anything is."""
    from resnet_jax.data.prepare.builders import check

    total, problems = check(source, data_dir, num_workers)
    wrong = 0
    for problem in problems:
        wrong += 1
        output.answer(problem)
    if wrong:
        raise UserError(f"{wrong:,} things are wrong in {source}.")
    output.answer(f"All {total:,} images of {source} are readable.")


def run(argv: Sequence[str], **options: Any) -> None:
    """Runs `main`, whose work the same command can resume after an interruption.

    Raises UserError for what a file system refuses.
    """
    try:
        main(argv, **options)
    except OSError as error:
        raise UserError(
            f"{error.filename or 'A file'}: {error.strerror}; fix that, and the same"
            " command resumes the work."
        ) from None
    except KeyboardInterrupt:
        output.note("Interrupted; the same command resumes the work.")
        raise


if __name__ == "__main__":
    output.command(run)
