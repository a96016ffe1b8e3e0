"""Writes the golden texts of all configs: `python -m tests.make_golden_configs`."""

from resnet_jax.config.saved import as_text
from tests.test_config import GOLDEN, RECIPES, golden, load

if __name__ == "__main__":
    for old in GOLDEN.glob("*.txt"):
        old.unlink()
    for name in RECIPES:
        golden(name).write_text(as_text(load(name)))
