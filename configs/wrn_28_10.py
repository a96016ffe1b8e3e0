"""WRN-28-10 on CIFAR-10: Zagoruyko & Komodakis 2016 (arXiv:1605.07146).

python -m resnet_jax.main --config=configs/wrn_28_10.py --workdir=runs/wrn

Variants: plain, and dropout (0.3 between the convolutions). Source: the README of
github.com/szagoruyko/wide-residual-networks, the median of 5 runs.
"""

from ml_collections import ConfigDict

from resnet_jax.config import RECIPES, choose, load

PUBLISHED = {"plain": "96.00", "dropout": "96.11"}


def get_config(kind: str = "plain") -> ConfigDict:
    """Returns the config of a variant of this recipe."""
    choose(kind, PUBLISHED)
    config = load(RECIPES / "cifar10.py")
    config.total = ConfigDict({"epochs": 200})
    config.model.name = "wrn28_10"
    if kind == "dropout":
        config.model.overrides.block_dropout = 0.3

    config.data.mean = (0.4914, 0.4824, 0.4467)  # 125.3, 123.0, 113.9 of 255
    config.data.std = (0.2471, 0.2435, 0.2616)  # 63.0, 62.1, 66.7
    config.data.pad_mode = "reflect"

    config.optim.decay_at = ({"epochs": 60}, {"epochs": 120}, {"epochs": 160})
    config.optim.decay_factor = 0.2
    config.optim.nesterov = True
    config.optim.weight_decay = 5e-4
    return config
