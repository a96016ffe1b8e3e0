"""Writes the golden figures of networks: python -m tests.oracles.make_golden [PATTERN].

PATTERN is a shell-style pattern of names; figures of other networks are kept.
"""

import fnmatch
import json
import sys
from pathlib import Path

import numpy as np

from resnet_jax.models import ZOO
from tests.helpers import keyed
from tests.oracles import networks

GOLDEN = Path(__file__).parents[1] / "golden" / "logits.json"


def figures(name: str) -> list[float]:
    """Returns some logits of the reference network, to seven digits."""
    images = keyed.images(1, keyed.sizes(ZOO[name].spec)[0])
    if ZOO[name].oracle == "keras":
        # Keras is imported only if it is needed, since that takes seconds.
        from tests.oracles.keras_networks import reference_logits

        logits = reference_logits(name, images)
    else:
        logits = networks.logits(networks.build(name), images)
    return [float(f"{value:.7g}") for value in keyed.golden_sample(np.asarray(logits))]


def main() -> None:
    """Computes and writes the figures."""
    pattern = sys.argv[1] if len(sys.argv) > 1 else "*"
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    chosen = fnmatch.filter(ZOO, pattern)
    entries = [
        # Each network has a line of its own, so that a change shows in the diff.
        f" {json.dumps(name)}: "
        f"{json.dumps(figures(name) if name in chosen else kept.get(name))}"
        for name in ZOO
    ]
    GOLDEN.write_text("{\n" + ",\n".join(entries) + "\n}\n")


if __name__ == "__main__":
    main()
