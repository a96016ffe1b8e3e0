"""Stochastic depth on CIFAR-10: Huang et al. 2016 (arXiv:1603.09382).

python -m resnet_jax.main --config=configs/stochastic_depth.py:110 --workdir=runs/depth

Variants: 110 and 1202 layers, and constant110, the baseline that drops no layer.
Source: table 1, and the README of github.com/yueatsprograms/Stochastic_Depth.
"""

from ml_collections import ConfigDict

from resnet_jax.config import RECIPES, choose, load

PUBLISHED = {"110": "94.75", "1202": "95.09", "constant110": "93.59"}


def get_config(network: str = "110") -> ConfigDict:
    """Returns the config of a variant of this recipe."""
    choose(network, PUBLISHED)
    config = load(RECIPES / "cifar10.py")
    config.total = ConfigDict({"epochs": 500})
    config.model.name = f"stochastic_depth{network.removeprefix('constant')}"
    if network == "constant110":
        config.model.overrides.drop_path = 0.0
    config.model.scan_blocks = network == "1202"
    config.optim.decay_at = ({"epochs": 250}, {"epochs": 375})
    config.optim.nesterov = True
    return config
