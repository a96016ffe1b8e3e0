"""Sample predictions of an evaluation, kept in the workdir for the report."""

import dataclasses
import io

import numpy as np

from resnet_jax.console import output
from resnet_jax.persistence import storage
from resnet_jax.persistence.storage import Path


@dataclasses.dataclass
class SamplePredictions:
    """Some images of an evaluation with their predictions, right and wrong ones.

    Attributes:
      wanted: how many of each kind.
      rows: `image`, `label`, `predicted` and `probability` of each.
    """

    wanted: int = 8
    rows: list[dict] = dataclasses.field(default_factory=list)

    def add(self, batch: dict, predictions: dict) -> None:
        """Takes from a batch what is still wanted."""
        right = predictions["label"] == batch["label"]
        for kind in (True, False):
            missing = self.wanted - sum(row["right"] == kind for row in self.rows)
            for i in np.flatnonzero(batch["mask"] & (right == kind))[:missing]:
                image = batch["image"][i]
                self.rows.append(
                    {
                        # Of several views, the centre.
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
    """Writes `predictions.npz` into the workdir; a failure is one warning."""
    path, rows = workdir / "predictions.npz", samples.rows
    with output.dispensable(str(path)):
        columns = {key: np.array([row[key] for row in rows]) for key in rows[0]}
        content = io.BytesIO()
        np.savez_compressed(content, classes=classes, **columns)
        storage.write(path, content.getvalue())
