"""Learning rate and weight decay over a run, without running it."""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from resnet_jax.config.durations import to_steps
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, load_config
from resnet_jax.data.derived_sources import few_shot
from resnet_jax.data.sources import KNOWN, open_source
from resnet_jax.errors import UserError
from resnet_jax.parallel.sharding import find_devices
from resnet_jax.persistence import storage
from resnet_jax.reports.figures import picture, shorten
from resnet_jax.training.optim import check, make_decay
from resnet_jax.training.schedules import make_schedule

# More points than a picture has pixels.
MOST_POINTS = 4000


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench schedule`."""
    parser.add_config(required=True)
    parser.add_argument(
        "--save",
        type=storage.path_of,
        help="The picture that is written, such as lr.png. Without it, none is"
        " plotted.",
    )
    parser.add_argument(
        "--train_size",
        type=count,
        help="The number of training images. The default is that of the config's data.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Prints a JSON object in place of a sentence.",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the range of the curves, and plots them."""
    config = load_config(args)
    find_devices()
    size = train_size_of(config, args.train_size)
    found = ranges(config, size)
    if args.save:
        draw(args.config, config, size, args.save)
    if args.json:
        output.answer(json.dumps({"config": args.config, **found}))
        return
    told = [f"{found['steps']} steps of {found['batch_size']} images"]
    told += [
        f"{what} from {found[key][0]:.4g} to {found[key][1]:.4g}"
        for key, what in (("rate", "learning rate"), ("decay", "decay a step"))
        if key in found
    ]
    output.answer(f"{args.config}: {', '.join(told)}")


def train_size_of(config: ConfigDict, given: int | None) -> int:
    """Training images a pass: as given, of the source, or of a known data set.

    Raises UserError if neither is known.
    """
    if given:
        return given
    data = config.data
    shape = (data.image_size, data.image_size, data.channels)
    try:
        source = open_source(
            data.source, data.train_split, data_dir=data.data_dir, fake_shape=shape
        )
    except UserError as error:
        _, sizes = KNOWN.get(data.source, (0, {}))
        if data.train_split in sizes:
            return sizes[data.train_split]
        raise UserError(f"{error} Or give --train_size.") from None
    return len(few_shot(source, data.shots, config.seed) if data.shots else source)


def curves(config: ConfigDict, train_size: int) -> dict[str, np.ndarray]:
    """`step`, and at each the `rate` and, where it is known, the `decay`."""
    check(config)
    total = to_steps(config.total, config.batch_size, train_size, "total")
    schedule = make_schedule(config, total_steps=total, train_size=train_size)
    steps = np.unique(np.linspace(0, total - 1, min(total, MOST_POINTS)).round())
    steps = steps.astype(np.int32)
    found = {"step": steps, "rate": jax.vmap(schedule)(jnp.asarray(steps))}
    if decay := make_decay(config, schedule):
        found["decay"] = jax.vmap(decay)(jnp.asarray(steps))
    return {key: np.asarray(values) for key, values in found.items()}


def ranges(config: ConfigDict, train_size: int) -> dict:
    """`steps` and `batch_size` of a run; least and most `rate` and, if known, `decay`.

    The rate is the schedule's, the decay the part of a weight that a step takes.
    """
    found = curves(config, train_size)
    total = to_steps(config.total, config.batch_size, train_size, "total")
    return {
        "steps": total,
        "batch_size": config.batch_size,
        **{
            key: [float(found[key].min()), float(found[key].max())]
            for key in ("rate", "decay")
            if key in found
        },
    }


def draw(
    name: str, config: ConfigDict, train_size: int, path: pathlib.Path
) -> pathlib.Path:
    """Draws the curves over the epochs."""
    found = curves(config, train_size)
    epochs = found["step"] * config.batch_size / train_size
    with picture(path, figsize=(8, 6)) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        above.plot(epochs, found["rate"])
        above.set(
            ylabel="learning rate",
            title=f"{shorten(name, 60)}: {config.optim.schedule}",
        )
        optim = config.optim
        if "decay" in found:
            below.plot(epochs, found["decay"])
        else:
            text = "depends on the gradients" if optim.weight_decay else "none"
            below.text(0.5, 0.5, text, ha="center", transform=below.transAxes)
        title = f"{optim.name}, {optim.decay} weight decay of {optim.weight_decay:g}"
        if optim.name in ("lars", "lamb"):
            title += ", before the trust ratio"
        below.set(xlabel="epoch", ylabel="part of a weight\nlost a step", title=title)
        for axes in (above, below):
            axes.grid(alpha=0.3)
    return path
