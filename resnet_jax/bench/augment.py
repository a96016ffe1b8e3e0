"""A contact sheet of what a config does to the pictures that it trains on."""

import argparse
import itertools
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from resnet_jax.bench.input import read_jpegs
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, load_config
from resnet_jax.data.crops import scramble
from resnet_jax.data.decode import Picture
from resnet_jax.data.image_ops import to_image
from resnet_jax.data.sources import open_source
from resnet_jax.errors import UserError
from resnet_jax.training.datasets import train_augment

GAP = 4  # pixels between pictures


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench augment`."""
    parser.add_config(required=True)
    parser.add_argument(
        "--images",
        type=pathlib.Path,
        help="A folder or .zip of JPEGs that are augmented. The default is the config's"
        " training data.",
    )
    parser.add_argument(
        "--save",
        type=pathlib.Path,
        required=True,
        help="The picture that is written, such as sheet.png.",
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
    """Draws the contact sheet of the arguments."""
    kind = Image.registered_extensions().get(args.save.suffix.lower())
    if kind not in Image.SAVE:
        raise UserError(f"--save={args.save} must be the name of a picture: sheet.png.")
    config = load_config(args)
    found = pictures(config, args.images)
    sheet = draw_sheet(config, found, rows=args.rows, columns=args.columns)
    try:
        sheet.save(args.save)
    except OSError as error:
        raise UserError(f"--save={args.save}: {error.strerror or error}.") from None
    output.say(f"{args.save}: {sheet.width}x{sheet.height}, originals on the left")
    if config.mix.mixup_alpha or config.mix.cutmix_alpha:
        output.say(
            "Not drawn: mixup and CutMix, which mix images inside the train step."
        )


def pictures(config: ConfigDict, images: pathlib.Path | None) -> Iterator[Picture]:
    """The JPEGs of a folder or .zip, or what the config trains on.

    Raises UserError if there are none.
    """
    data = config.data
    if images:
        for name, content in read_jpegs(images).items():
            yield Picture(content, data.channels, name)
        return
    shape = (data.image_size, data.image_size, data.channels)
    source = open_source(
        data.source, data.train_split, data_dir=data.data_dir, fake_shape=shape
    )
    # Spread over the split, in which classes may stand together.
    for index in np.random.default_rng(config.seed).permutation(len(source)):
        image, _ = source[int(index)]
        yield Picture(image, data.channels, source.name(int(index)))


def draw_sheet(
    config: ConfigDict, found: Iterable[Picture], *, rows: int, columns: int
) -> Image.Image:
    """Draws a picture a row: the original, and what augmentation makes of it.

    Args:
      config: whose training pipeline is drawn.
      found: pictures; those behind the first `rows` are not used.
      rows: most pictures.
      columns: augmented versions of each.
    """
    augment = train_augment(config)
    side = augment.side
    cells = []
    for row, picture in enumerate(itertools.islice(found, rows)):
        # The seed, the picture and the version: as many different keys.
        keys = scramble(
            np.arange(columns, dtype=np.uint64) + scramble(np.uint64([row]))
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
