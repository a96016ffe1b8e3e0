"""Draws the predictions of a network beside the images."""

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
      path: The file; its suffix says the format.
      pixels: The images.
      predictions: The predictions for each image, the best one first.

    Raises:
      UserError: The picture cannot be written.
    """
    columns = min(len(predictions), 5)
    rows = -(-len(predictions) // columns)
    with picture(path, figsize=(3 * columns, 3.6 * rows)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for axes, shown, top in zip(grid, pixels, predictions, strict=False):
            axes.imshow(shown.squeeze(), cmap="gray", vmin=0, vmax=255)
            first, *others = (
                f"{shorten(one.name)} ({one.probability:.2f})" for one in top
            )
            axes.set_title(first, fontsize=10)
            axes.set_xlabel("\n".join(others[:2]), fontsize=8)
        for axes in figure.axes:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
