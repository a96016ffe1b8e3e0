"""Classifies image files: `python -m resnet_jax.predict WEIGHTS IMAGE...`.

WEIGHTS is anything that `resnet_jax.load` takes: a file of any framework, a workdir, a
weights directory or `timm:NAME.TAG`. The card of the weights says how images are
prepared. IMAGE is one of these:

- an image file;
- a folder, whose images and those of its subfolders are taken;
- a pattern in quotes, such as 'PHOTOS/**/*.jpg', where ** stands for any
  subfolders; the name of a file or folder that exists is not a pattern;
- a single -, for a list of files and folders on standard input: one path per line, or
  separated by null bytes, as find -print0 writes them.

For each image the most probable classes are printed, in the order of the images, as
soon as they are computed. Images that cannot be read are named on standard error and
skipped, and the exit code is then 1.
"""

import collections
import contextlib
import sys
from collections.abc import Generator

import numpy as np
import tqdm

from resnet_jax.config.defaults import MAX_PIXELS
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count
from resnet_jax.data.given_images import GivenImages
from resnet_jax.data.workers import map_ahead
from resnet_jax.errors import UserError
from resnet_jax.parallel.sharding import prepare_memory
from resnet_jax.persistence import compile_cache
from resnet_jax.reports import predictions
from resnet_jax.reports.figures import picture_to_write
from resnet_jax.reports.predictions import MOST_SHOWN, Row
from resnet_jax.weights.card import Prediction
from resnet_jax.weights.trained import BATCH_SIZE, load

# The smallest number of images that are read ahead: as many as are read while the
# program is compiled.
AHEAD = 256


def main(argv: list[str]) -> None:
    """Runs the command, which the module's docstring describes."""
    parser = Parser("predict", __doc__)
    parser.add_weights()
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="The image files to classify, in any format that Pillow reads, such as"
        " JPEG or PNG; folders of them; patterns in quotes, such as 'PHOTOS/**/*.jpg';"
        " or - for a list of paths on standard input.",
    )
    parser.add_argument(
        "--topk",
        metavar="K",
        type=count,
        default=5,
        help="The number of the most probable classes to print for each image. The"
        " default is %(default)s.",
    )
    parser.add_argument(
        "--batch_size",
        metavar="N",
        type=count,
        default=BATCH_SIZE,
        help="The number of images that are computed at a time. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--flip",
        action="store_true",
        help="Takes the mean of the logits of each image and of its mirror image. It is"
        " off by default.",
    )
    parser.add_argument(
        "--csv",
        action="store_true",
        help="Prints a CSV table instead of text, with a row for each image: its path,"
        " and the names and probabilities of its classes. It is off by default.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Prints one JSON document instead of text. It is off by default.",
    )
    parser.add_argument(
        "--logits",
        action="store_true",
        help="Also prints all logits of each image. It is off by default.",
    )
    parser.add_argument(
        "--save",
        metavar="FILE.png",
        type=picture_to_write,
        help="The file to which a picture is written that shows each of the first"
        f" {MOST_SHOWN} images as the network sees it, with its predictions. By default"
        " none is written.",
    )
    parser.add_argument(
        "--max_pixels",
        metavar="N",
        type=count,
        default=MAX_PIXELS,
        help="The number of pixels beyond which an image file is rejected. The default"
        " is that of data.max_pixels, %(default)s.",
    )
    args = parser.parse(argv[1:])
    if args.csv and args.json:
        raise UserError("--csv and --json exclude each other; give one of them.")
    given = GivenImages(args.images)
    compile_cache.turn_on()
    prepare_memory()
    model = load(args.weights, model=args.model)
    card = model.card
    # Networks that take neither grey nor colour images are rejected before any is read.
    card.crop([])
    shown: list[tuple[np.ndarray, list[Prediction]]] = []
    classified = problems = 0

    def read(given: str | UserError) -> tuple[str, np.ndarray] | UserError:
        if isinstance(given, UserError):
            return given
        # A file may be a pipe, so each is read only once.
        try:
            (pixels,) = card.crop(given, args.max_pixels)
        except UserError as error:
            return error
        return given, pixels

    def rows(bar: tqdm.tqdm) -> Generator[Row, None, None]:
        nonlocal classified
        # The images that were read and whose predictions are not printed yet.
        waiting: collections.deque[tuple[str, np.ndarray]] = collections.deque()

        def crops() -> Generator[np.ndarray, None, None]:
            nonlocal problems
            ahead = max(AHEAD, 2 * args.batch_size)
            for found in map_ahead(read, given, ahead=ahead):
                bar.total = given.total
                if not isinstance(found, UserError):
                    waiting.append(found)
                    yield found[1]
                    continue
                # If there is nothing else to classify, the error ends the command.
                if given.total == 1:
                    raise found
                problems += 1
                output.fail(output.one_line(str(found)))
                bar.update()

        stream = model.stream_logits(
            crops(), batch_size=args.batch_size, flip=args.flip
        )
        for logits in stream:
            classified += 1
            path, pixels = waiting.popleft()
            top = card.top(logits, args.topk)
            if args.save and classified <= MOST_SHOWN:
                shown.append((pixels, top))
            yield Row(path, top, logits if args.logits else None)
            bar.update()

    classes = card.spec["num_classes"]
    with _progress_bar() as bar, contextlib.closing(rows(bar)) as stream:
        if args.json:
            facts = {"weights": args.weights, "network": card.network}
            lines = predictions.json_lines(stream, facts)
        elif args.csv:
            k, logits = min(args.topk, classes), classes if args.logits else 0
            lines = predictions.csv_lines(stream, predictions.columns(k, logits))
        else:
            lines = predictions.text_lines(stream)
        for line in lines:
            output.answer(line)
    if shown:
        pixels, tops = zip(*shown, strict=True)
        predictions.draw_predictions(args.save, np.stack(pixels), tops)
        if classified > len(shown):
            output.note(
                f"{args.save} shows the first {len(shown)} of {classified:,} images."
            )
    if problems:
        raise UserError(
            f"{problems:,} of the given files and folders could not be read, as said"
            f" above. Classified images: {classified:,}."
        )


def _progress_bar() -> tqdm.tqdm:
    """Returns a progress bar, which is shown on terminals until the work is done."""
    return tqdm.tqdm(
        unit=" images",
        dynamic_ncols=True,
        disable=sys.stderr is None or not sys.stderr.isatty(),
        leave=False,
    )


if __name__ == "__main__":
    output.command(main)
