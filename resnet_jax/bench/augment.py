"""Draws a contact sheet that shows what a config does to its training pictures."""

import argparse
import itertools
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from resnet_jax import paths
from resnet_jax.bench.input import read_jpegs
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, load_config
from resnet_jax.data.crops import scramble
from resnet_jax.data.decode import Picture
from resnet_jax.data.image_ops import to_image
from resnet_jax.errors import UserError
from resnet_jax.training.completion import complete
from resnet_jax.training.datasets import open_train_split, train_augment

GAP = 4  # pixels between pictures


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench augment`."""
    parser.add_config(required=True)
    parser.add_argument(
        "--images",
        type=paths.local,
        help="A folder or .zip of JPEGs that are augmented. The default is the config's"
        " training data.",
    )
    parser.add_argument(
        "--save",
        type=paths.file_to_write,
        required=True,
        help="The file of the contact sheet, such as sheet.png.",
    )
    parser.add_argument(
        "--rows",
        type=count,
        default=8,
        help="The number of training pictures, one per row. The default is"
        " %(default)s.",
    )
    parser.add_argument(
        "--columns",
        type=count,
        default=8,
        help="The number of augmented versions of each picture. The default is"
        " %(default)s.",
    )


def run(args: argparse.Namespace) -> None:
    """Draws the contact sheet and writes it to a file.

    Raises:
      UserError: There are no pictures, or the file cannot be written.
    """
    kind = Image.registered_extensions().get(args.save.suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(
            f"--save={args.save} must end with the suffix of a picture that can be"
            " written, for example sheet.png."
        )
    config = complete(load_config(args))
    pictures = training_pictures(config, args.images)
    sheet = draw_sheet(config, pictures, rows=args.rows, columns=args.columns)
    try:
        sheet.save(args.save)
    except OSError as error:
        raise UserError(f"--save={args.save}: {error.strerror or error}.") from None
    output.say(f"{args.save}: {sheet.width}x{sheet.height}, originals on the left")
    if config.mix.mixup_alpha or config.mix.cutmix_alpha:
        output.say(
            "Mixup and CutMix are not shown: they combine images inside the train step."
        )


def training_pictures(
    config: ConfigDict, images: pathlib.Path | None
) -> Iterator[Picture]:
    """Yields the pictures to augment.

    Args:
      config: The config, whose training data are read in an order that `config.seed`
        shuffles.
      images: A folder or .zip of JPEGs to read instead.

    Raises:
      UserError: There are none.
    """
    data = config.data
    if images:
        for name, content in read_jpegs(images).items():
            yield Picture(content, data.channels, name, data.max_pixels)
        return
    source = open_train_split(config)
    # Sources are often sorted by class, so the first pictures would all be of one.
    for index in np.random.default_rng(config.seed).permutation(len(source)):
        image, _ = source[int(index)]
        name = source.name(int(index))
        yield Picture(image, data.channels, name, data.max_pixels)


def draw_sheet(
    config: ConfigDict, pictures: Iterable[Picture], *, rows: int, columns: int
) -> Image.Image:
    """Draws one row per picture: the original, then augmented versions of it.

    Args:
      config: The config that defines the augmentation.
      pictures: The pictures, of which the first `rows` are shown.
      rows: The maximum number of pictures.
      columns: The number of augmented versions of each picture.
    """
    augment = train_augment(config)
    side = augment.side
    cells = []
    for row, picture in enumerate(itertools.islice(pictures, rows)):
        # Each version has a key of its own, derived from seed, picture and version.
        keys = scramble(
            np.arange(columns, dtype=np.uint64) + scramble(np.array([row], np.uint64))
        )
        keys = scramble(keys ^ np.uint64(config.seed))
        versions = [augment(picture, key) for key in keys.tolist()]
        original = ImageOps.pad(to_image(picture.pixels()), (side, side))
        cells.append([original, *map(to_image, versions)])
    size = GAP + np.array([columns + 1, len(cells)]) * (side + GAP)
    sheet = Image.new("RGB", tuple(size.tolist()), "white")
    for row, images in enumerate(cells):
        for column, image in enumerate(images):
            place = GAP + np.array([column, row]) * (side + GAP)
            sheet.paste(image, tuple(place.tolist()))
    return sheet
