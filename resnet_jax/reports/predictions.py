"""Draws images with the predictions of a network, for the command `predict`."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from resnet_jax.persistence.storage import Path
from resnet_jax.reports.figures import picture, shorten
from resnet_jax.weights.card import Prediction


def draw_predictions(
    path: Path,
    pixels: UInt8[np.ndarray, "n h w c"],
    predictions: Sequence[Sequence[Prediction]],
) -> None:
    """Draws images as a network sees them, each with its most probable classes.

    Args:
      path: The file to write; its suffix says the format.
      pixels: The images, uint8[n, h, w, c].
      predictions: The predictions of each image, the most probable one first.

    Raises:
      UserError: The picture cannot be written.
    """
    columns = min(len(predictions), 5)
    rows = -(-len(predictions) // columns)
    with picture(path, figsize=(3 * columns, 3.6 * rows)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, image, top in zip(grid, pixels, predictions, strict=False):
            axes.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255)
            first, *runners_up = (
                f"{shorten(prediction.name)} ({prediction.probability:.2f})"
                for prediction in top
            )
            axes.set_title(first, fontsize=10)
            axes.set_xlabel("\n".join(runners_up[:2]), fontsize=8)
        for axes in figure.axes:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
