"""WRN-28-10 on CIFAR-10 with mixup: Zhang et al. 2017 (arXiv:1710.09412).

python -m resnet_jax.main --config=configs/mixup_cifar10.py --workdir=runs/mixup

Variants: mixup, and none, the baseline. Source: table 3. A run has 200 epochs; the
learning rate is divided by 10 after 100 and 150; a batch has a single mixing weight.
"""

from ml_collections import ConfigDict

from resnet_jax.config import RECIPES, choose, load

PUBLISHED = {"mixup": "97.3", "none": "96.2"}


def get_config(kind: str = "mixup") -> ConfigDict:
    """Returns the config of a variant of this recipe."""
    choose(kind, PUBLISHED)
    config = load(RECIPES / "cifar10.py")
    config.total = ConfigDict({"epochs": 200})
    config.model.name = "wrn28_10"
    config.optim.decay_at = ({"epochs": 100}, {"epochs": 150})
    if kind == "mixup":
        config.mix.mixup_alpha = 1.0
    return config
