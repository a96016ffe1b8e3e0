"""Classifies image files: `python -m resnet_jax.predict WEIGHTS IMAGE...`.

WEIGHTS is anything that `resnet_jax.load` takes: a file of any framework, a workdir, a
weights directory or `timm:NAME.TAG`. The card of the weights says how images are
prepared. IMAGE is an image file, or a folder, whose images and those of its subfolders
are taken. For each image the five most probable classes are printed as soon as they are
computed. Images that cannot be read are named on standard error, and the exit code is
then 1.
"""

import collections
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from resnet_jax.config.defaults import MAX_PIXELS
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count
from resnet_jax.data.image_files import describe, find_images
from resnet_jax.errors import UserError
from resnet_jax.persistence import storage
from resnet_jax.reports.figures import picture_to_write
from resnet_jax.reports.predictions import draw_predictions
from resnet_jax.weights.trained import load


def main(argv: list[str]) -> None:
    """Runs the command, which the module's docstring describes."""
    parser = Parser("predict", __doc__)
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="The weights: a file of torchvision, timm, Keras or BiT, a workdir of a"
        " run, a weights directory, or timm:NAME.TAG on the Hugging Face hub.",
    )
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="The image files to classify, in any format that Pillow reads, such as"
        " JPEG or PNG, or folders of them.",
    )
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="The network's name. It is needed only if neither the weights nor a card"
        " beside them name the network. The default is then the first network that"
        " the weights fit.",
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
        help="The file to which a picture is written that shows each image as the"
        " network sees it, with its predictions. By default none is written.",
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
    model = load(args.weights, model=args.model)
    card = model.card
    # Networks that take neither grey nor colour images are rejected before any is read.
    card.crop([])
    files: list[str] = []
    problems = 0

    def report(error: UserError) -> None:
        nonlocal problems
        # If there is nothing else to classify, the error ends the command.
        if len(args.images) == 1 and len(files) <= 1:
            raise error
        problems += 1
        output.fail(output.one_line(str(error)))

    files.extend(_files_of(args.images, report))
    # The files that were read and whose predictions are not printed yet.
    waiting: collections.deque[str] = collections.deque()
    shown: list[np.ndarray] = []

    def crops() -> Iterator[np.ndarray]:
        for file in files:
            # A file may be a pipe, so each is read only once.
            try:
                (pixels,) = card.crop(file, args.max_pixels)
            except UserError as error:
                report(error)
                continue
            waiting.append(file)
            if args.save:
                shown.append(pixels)
            yield pixels

    images, predictions, classified = [], [], 0
    for logits in model.stream_logits(crops()):
        classified += 1
        file, top = waiting.popleft(), card.top(logits)
        if args.save:
            predictions.append(top)
        if args.json:
            image = {"file": file, "top": [prediction._asdict() for prediction in top]}
            images.append(image | ({"logits": logits.tolist()} if args.logits else {}))
            continue
        output.answer(output.one_line(file))
        for prediction in top:
            name = output.one_line(prediction.name)
            output.answer(f"  {100 * prediction.probability:6.2f} %  {name}")
        if args.logits:
            output.answer(f"  logits: {' '.join(f'{value:.6f}' for value in logits)}")
    if args.json:
        document = {"weights": args.weights, "network": card.network, "images": images}
        output.answer(storage.to_json(document, indent=2))
    if shown:
        draw_predictions(args.save, np.stack(shown), predictions)
    if problems:
        raise UserError(
            f"{problems:,} of the given files and folders could not be read, as said"
            f" above. Classified images: {classified:,}."
        )


def _files_of(
    locations: Sequence[str], report: Callable[[UserError], None]
) -> Iterator[str]:
    """Yields the files of a command line, in which folders stand for their images."""
    for location in locations:
        try:
            path = storage.path_of(location)
            if storage.is_remote(path) or not os.path.isdir(path):
                yield os.fspath(path)
                continue
            images, left_out = find_images(path)
        except UserError as error:
            report(error)
            continue
        others = describe(left_out)
        if not images:
            report(UserError(f"{path} holds no images{others and f' ({others})'}."))
        elif others:
            output.note(f"{path}: {others}.")
        yield from (os.fspath(path / image) for image in images)


if __name__ == "__main__":
    output.command(main)
