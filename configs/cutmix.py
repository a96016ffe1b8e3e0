"""ResNets on ImageNet with CutMix: Yun et al. 2019 (arXiv:1905.04899).

python -m resnet_jax.main --config=configs/cutmix.py:50 --workdir=runs/cutmix

Variants: 50 and 101 layers with CutMix, and none50 without it. Source: table 3 (the
best accuracy of a run).
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults

PUBLISHED = {"50": "78.60", "101": "79.83", "none50": "76.32"}


def get_config(network: str = "50") -> ConfigDict:
    """Returns the config of this recipe."""
    choose(network, PUBLISHED)
    config = defaults.get_config()
    config.total = ConfigDict({"epochs": 300})
    config.model.name = f"resnet{network.removeprefix('none')}"

    config.data.color_jitter = (0.4, 0.4, 0.4, 0.0)
    config.data.lighting = 0.1

    config.optim.schedule = "step"
    config.optim.decay_at = ({"epochs": 75}, {"epochs": 150}, {"epochs": 225})
    config.optim.warmup = ConfigDict({"epochs": 0})
    if not network.startswith("none"):
        config.mix.cutmix_alpha = 1.0
    return config
