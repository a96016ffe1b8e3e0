"""Writes the golden figures: python -m tests.oracles.make_golden [PATTERN]"""

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
    """Some logits of the reference network, to seven digits."""
    images = keyed.images(1, keyed.sizes(ZOO[name].spec)[0])
    if ZOO[name].oracle == "keras":
        # Keras chooses its backend when it is imported.
        from tests.oracles.test_keras import reference_logits

        logits = reference_logits(name, images)
    else:
        logits = networks.logits(networks.build(name), images)
    return [float(f"{value:.7g}") for value in keyed.golden_sample(np.asarray(logits))]


def main():
    pattern = sys.argv[1] if len(sys.argv) > 1 else "*"
    kept = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    chosen = fnmatch.filter(ZOO, pattern)
    entries = [
        # One line for each network, so that a change shows in the diff.
        f" {json.dumps(name)}: "
        f"{json.dumps(figures(name) if name in chosen else kept.get(name))}"
        for name in ZOO
    ]
    GOLDEN.write_text("{\n" + ",\n".join(entries) + "\n}\n")


if __name__ == "__main__":
    main()
