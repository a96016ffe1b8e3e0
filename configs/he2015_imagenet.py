"""Residual and plain networks on ImageNet: He et al. 2015 (arXiv:1512.03385).

python -m resnet_jax.main --config=configs/he2015_imagenet.py:50 --workdir=runs/he50

Argument: 18, 34, 50, 101, 152, plain18 or plain34. Source: top-1 of ten crops, of
tables 2 and 3 (50 layers and more: github.com/KaimingHe/deep-residual-networks).

Section 3.4: the short side is drawn from 256 to 480 pixels, a crop of 224, colours
shifted along their principal components; the rate falls when the error does not; the
statistics of batch norm are computed anew in the end. The paper subtracts the mean of
each pixel; here each channel's mean is subtracted, and it is divided by the deviation.
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults

PUBLISHED = {
    **{"18": "72.12", "34": "74.97", "50": "77.1", "101": "78.2", "152": "78.6"},
    **{"plain18": "72.06", "plain34": "71.46"},
}


def get_config(network: str = "50") -> ConfigDict:
    choose(network, PUBLISHED)
    config = defaults.get_config()
    config.total = ConfigDict({"steps": 600_000})

    config.model.name = network if network.startswith("plain") else f"resnet{network}"
    if network in ("50", "101", "152"):
        config.model.name += "_v1"
    elif network in ("18", "34"):
        config.model.overrides.shortcut = "pad"  # option A, of table 2

    config.data.train_crop = "short_side"
    config.data.lighting = 0.1

    config.optim.schedule = "plateau"
    config.optim.warmup = ConfigDict({"steps": 0})
    config.optim.nesterov = False
    config.bn_recompute = 200
    config.evaluate.views = "ten_crop"
    return config
