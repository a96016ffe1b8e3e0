"""Sample predictions of an evaluation, kept in the workdir for the report."""

import dataclasses
import io
from typing import Any

import numpy as np

from resnet_jax.console import output
from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import Path


@dataclasses.dataclass
class SamplePredictions:
    """Some images of an evaluation with right and with wrong predictions.

    Attributes:
      per_kind: The number of images of each kind, right and wrong.
      rows: A dictionary per image: `image` (uint8[h, w, c]), `label` and `predicted`
        (class numbers), `probability` (of the prediction) and `right`.
    """

    per_kind: int = 8
    rows: list[dict] = dataclasses.field(default_factory=list)

    def add(self, batch: dict, predictions: dict) -> None:
        """Takes images from an evaluated batch until there are enough of each kind.

        Args:
          batch: The arrays `image` (uint8[n, h, w, c], or uint8[n, views, h, w, c]),
            `label` and `mask` (False for padding).
          predictions: The arrays `label` and `probability` of the predictions.
        """
        right = predictions["label"] == batch["label"]
        for kind in (True, False):
            missing = self.per_kind - sum(row["right"] == kind for row in self.rows)
            for i in np.flatnonzero(batch["mask"] & (right == kind))[:missing]:
                image = batch["image"][i]
                self.rows.append(
                    {
                        # The first of several views is the centre crop.
                        "image": image if image.ndim == 3 else image[0],
                        "label": int(batch["label"][i]),
                        "predicted": int(predictions["label"][i]),
                        "probability": float(predictions["probability"][i]),
                        "right": kind,
                    }
                )


def save_samples(
    workdir: Path, samples: SamplePredictions, classes: tuple[str, ...]
) -> None:
    """Writes `predictions.npz` into the workdir; a failure is one warning.

    Args:
      workdir: The directory of the run.
      samples: The images, at least one.
      classes: The names of the classes.
    """
    path, rows = workdir / "predictions.npz", samples.rows
    with output.dispensable(str(path)):
        columns: dict[str, Any] = {
            key: np.array([row[key] for row in rows]) for key in rows[0]
        }
        content = io.BytesIO()
        np.savez_compressed(content, classes=classes, **columns)
        storage.write_by_product(path, content.getvalue())
