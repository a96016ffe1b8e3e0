"""Writes the golden figures: python -m tests.oracles.make_golden"""

import json
from pathlib import Path

import numpy as np

from resnet_jax.models import get_spec, list_models
from tests import keyed
from tests.oracles import networks

GOLDEN = Path(__file__).parents[1] / "golden" / "logits.json"


def figures(name: str) -> dict[str, list[float]]:
    """Some logits of the reference network at each size, to seven digits.

    They are computed in float64, so that they do not depend on the machine.
    """
    network = networks.build(name).double()
    result = {}
    for size in keyed.golden_sizes(get_spec(name)):
        logits = networks.logits(network, keyed.images(2, size).astype(np.float64))
        sample = keyed.golden_sample(logits)
        result[str(size)] = [float(f"{value:.7g}") for value in sample]
    return result


def main():
    # One line for each network and size, so that a change shows in the diff.
    entries = []
    for name in list_models():
        lines = [
            f"  {json.dumps(size)}: {json.dumps(values)}"
            for size, values in figures(name).items()
        ]
        entries.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    GOLDEN.write_text("{\n" + ",\n".join(entries) + "\n}\n")


if __name__ == "__main__":
    main()
