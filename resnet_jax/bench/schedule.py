"""Learning rate and weight decay over a run, without running it."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from resnet_jax.config import to_steps
from resnet_jax.data.sources import KNOWN, few_shot, open_source
from resnet_jax.errors import UserError
from resnet_jax.optim import check, make_decay
from resnet_jax.schedules import make_schedule

# More points than a picture has pixels.
MOST_POINTS = 4000


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


def row(name: str, config: ConfigDict, train_size: int) -> dict:
    """The rate's range over a run, as a row of the benchmarks."""
    found = curves(config, train_size)
    values = {key: found[key] for key in ("rate", "decay") if key in found}
    total = to_steps(config.total, config.batch_size, train_size, "total")
    return {
        "name": f"schedule {name}, {total} steps of {config.batch_size} images",
        "value": float(values["rate"].max()),
        "unit": "peak learning rate",
        "peer": None,
        "peer_value": None,
        "ratio": None,
        "spread": {key: [float(x.min()), float(x.max())] for key, x in values.items()},
    }


def draw(
    name: str, config: ConfigDict, train_size: int, path: pathlib.Path
) -> pathlib.Path:
    """Draws the curves over the epochs."""
    found = curves(config, train_size)
    epochs = found["step"] * config.batch_size / train_size
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(epochs, found["rate"])
    above.set(ylabel="learning rate", title=f"{name}: {config.optim.schedule}")
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
    figure.savefig(path, dpi=100)
    return path
