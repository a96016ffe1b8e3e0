"""ResNet-50 on ImageNet in small and large batches: Goyal et al. 2017.

python -m resnet_jax.main --config=configs/goyal2017.py:8192 --workdir=runs/goyal

Variants: the batch size, any number. Source: arXiv:1706.02677, table 1, which has a
top-1 error of 23.60 +- 0.12 % at 256 and of 23.74 +- 0.09 % at 8192 (mean and standard
deviation of 5 runs).
"""

from ml_collections import ConfigDict

from resnet_jax.config import RECIPES, load

PUBLISHED = {"256": "76.40", "8192": "76.26"}


def get_config(batch_size: str = "8192") -> ConfigDict:
    """Returns the config of a variant of this recipe."""
    config = load(RECIPES / "r50.py")
    config.batch_size = int(batch_size)
    return config
