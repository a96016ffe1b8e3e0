"""ResNet-18 on ImageNet with the recipe of configs/r50.py.

python -m resnet_jax.main --config=configs/r18.py --workdir=runs/r18

Published for a similar recipe (torchvision, batch size 256, weight decay on all
parameters): top-1 69.758 %. Not run here.
"""

from ml_collections import ConfigDict

from resnet_jax.config import RECIPES, load


def get_config() -> ConfigDict:
    """Returns the config of this recipe."""
    config = load(RECIPES / "r50.py")
    config.model.name = "resnet18"
    return config
