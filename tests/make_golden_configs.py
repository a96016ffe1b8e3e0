"""Writes the golden texts of all configs: `python -m tests.make_golden_configs`."""

from resnet_jax.config import as_text
from tests.test_config import CONFIGS, GOLDEN, load

if __name__ == "__main__":
    for old in GOLDEN.glob("*.txt"):
        old.unlink()
    for path in CONFIGS:
        (GOLDEN / f"{path.stem}.txt").write_text(as_text(load(path.stem)))
