"""Plots the learning rate and weight decay over a run, without training."""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from resnet_jax.config.durations import to_steps
from resnet_jax.console import output
from resnet_jax.console.arguments import Parser, count, load_config
from resnet_jax.data.sources import KNOWN
from resnet_jax.errors import UserError
from resnet_jax.parallel.sharding import find_devices
from resnet_jax.persistence import storage
from resnet_jax.reports.figures import picture, picture_to_write, shorten
from resnet_jax.training import completion
from resnet_jax.training.datasets import open_train_split
from resnet_jax.training.optim import OPTIMIZERS, check, make_decay
from resnet_jax.training.schedules import make_schedule

# The maximum number of plotted points, which is more than a picture has pixels.
MOST_POINTS = 4000


def add_arguments(parser: Parser) -> None:
    """Adds the arguments of `bench schedule`."""
    parser.add_config(required=True)
    parser.add_argument(
        "--save",
        type=picture_to_write,
        help="The file of the plot, such as lr.png. Without it, nothing is plotted.",
    )
    parser.add_argument(
        "--train_size",
        type=count,
        help="The number of training images. The default is that of the config's data,"
        " which need not be there if their size is known.",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="Prints a JSON object instead of a sentence.",
    )


def run(args: argparse.Namespace) -> None:
    """Prints the range of the curves, and plots them."""
    config = completion.complete(load_config(args))
    find_devices()
    size = find_train_size(config, args.train_size)
    config = completion.with_total(config, size)
    summary = ranges(config, size)
    if args.save:
        draw(args.config, config, size, args.save)
    if args.json:
        output.answer(storage.to_json({"config": args.config, **summary}))
        return
    parts = [f"{summary['steps']} steps of {summary['batch_size']} images"]
    parts += [
        f"{title} from {summary[key][0]:.4g} to {summary[key][1]:.4g}"
        for key, title in (("rate", "learning rate"), ("decay", "decay per step"))
        if key in summary
    ]
    output.answer(f"{args.config}: {', '.join(parts)}")


def find_train_size(config: ConfigDict, train_size: int | None) -> int:
    """Returns the number of training images of a run.

    Args:
      config: The config of the run.
      train_size: The number given by the user; None takes it from the config's data,
        or from the known sizes of a data set that is not there.

    Raises:
      UserError: The data are not there, and their size is not known.
    """
    if train_size:
        return train_size
    data = config.data
    try:
        return len(open_train_split(config))
    except UserError as error:
        _, sizes = KNOWN.get(data.source, (0, {}))
        if data.train_split in sizes:
            return sizes[data.train_split]
        raise UserError(f"{error} Or give --train_size.") from None


def curves(config: ConfigDict, train_size: int) -> dict[str, np.ndarray]:
    """Computes the curves of a run at up to `MOST_POINTS` of its steps.

    Args:
      config: The config of the run.
      train_size: The number of training images.

    Returns:
      `step`; `rate`, the learning rate of the schedule at each of these steps; and
      `decay`, the fraction of a weight that each step removes, unless it depends on
      the gradients or there is none.

    Raises:
      UserError: The config contradicts itself.
    """
    check(config)
    total = to_steps(config.total, config.batch_size, train_size, "total")
    schedule = make_schedule(config, total_steps=total, train_size=train_size)
    steps = np.unique(np.linspace(0, total - 1, min(total, MOST_POINTS)).round())
    steps = steps.astype(np.int32)
    values = {"step": steps, "rate": jax.vmap(schedule)(jnp.asarray(steps))}
    if decay := make_decay(config, schedule):
        values["decay"] = jax.vmap(decay)(jnp.asarray(steps))
    return {key: np.asarray(value) for key, value in values.items()}


def ranges(config: ConfigDict, train_size: int) -> dict:
    """Summarizes the curves of a run.

    Args:
      config: The config of the run.
      train_size: The number of training images.

    Returns:
      `steps` and `batch_size`, and the minimum and maximum of `rate` and, if `curves`
      has it, of `decay`.
    """
    values = curves(config, train_size)
    total = to_steps(config.total, config.batch_size, train_size, "total")
    return {
        "steps": total,
        "batch_size": config.batch_size,
        **{
            key: [float(values[key].min()), float(values[key].max())]
            for key in ("rate", "decay")
            if key in values
        },
    }


def draw(
    name: str, config: ConfigDict, train_size: int, path: pathlib.Path
) -> pathlib.Path:
    """Plots the curves over the epochs of a run.

    Args:
      name: The name of the config, for the title.
      config: The config of the run.
      train_size: The number of training images.
      path: The file of the plot.

    Returns:
      The file.
    """
    values = curves(config, train_size)
    epochs = values["step"] * config.batch_size / train_size
    with picture(path, figsize=(8, 6)) as figure:
        above, below = figure.subplots(2, 1, sharex=True)
        above.plot(epochs, values["rate"])
        above.set(
            ylabel="learning rate",
            title=f"{shorten(name, 60)}: {config.optim.schedule}",
        )
        optim = config.optim
        if "decay" in values:
            below.plot(epochs, values["decay"])
        else:
            text = "depends on the gradients" if optim.weight_decay else "none"
            below.text(0.5, 0.5, text, ha="center", transform=below.transAxes)
        title = f"{optim.name}, {optim.decay} weight decay of {optim.weight_decay:g}"
        if OPTIMIZERS[optim.name].trust_ratio:
            title += ", before the trust ratio"
        below.set(
            xlabel="epoch", ylabel="fraction of a weight\nremoved per step", title=title
        )
        for axes in (above, below):
            axes.grid(alpha=0.3)
    return path
