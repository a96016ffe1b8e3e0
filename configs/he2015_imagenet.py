"""Residual and plain networks on ImageNet: He et al. 2015 (arXiv:1512.03385).

python -m resnet_jax.main --config=configs/he2015_imagenet.py:50 --workdir=runs/he50

Variants: 18, 34, 50, 101 and 152 layers, and plain18 and plain34 without shortcuts.
Source: top-1 with ten crops in tables 2 and 3 (for 50 layers and more:
github.com/KaimingHe/deep-residual-networks).

Section 3.4: the short side is randomly scaled to 256 to 480 pixels, and 224x224 pixels
are cropped; colours are shifted along their principal components; the learning rate is
reduced when the error plateaus. Precise batch norm computes the final statistics. The
paper subtracts the mean of each pixel; here the mean of each channel is subtracted, and
the result is divided by the standard deviation.
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults

PUBLISHED = {
    **{"18": "72.12", "34": "74.97", "50": "77.1", "101": "78.2", "152": "78.6"},
    **{"plain18": "72.06", "plain34": "71.46"},
}


def get_config(network: str = "50") -> ConfigDict:
    """Returns the config of this recipe."""
    choose(network, PUBLISHED)
    config = defaults.get_config()
    config.total = ConfigDict({"steps": 600_000})

    config.model.name = network if network.startswith("plain") else f"resnet{network}"
    if network in ("50", "101", "152"):
        config.model.name += "_v1"
    elif network in ("18", "34"):
        config.model.overrides.shortcut = "pad"  # option A, as in table 2

    config.data.train_crop = "short_side"
    config.data.lighting = 0.1

    config.optim.schedule = "plateau"
    config.optim.warmup = ConfigDict({"steps": 0})
    config.optim.nesterov = False
    config.precise_bn = 200
    config.evaluate.views = "ten_crop"
    return config
