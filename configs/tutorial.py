"""The ResNet-50 of Keras tutorials on photographs of hands that show 0 to 5, 64x64.

python -m resnet_jax.main --config=configs/tutorial.py:20 --workdir=runs/tutorial

Variants: 2 and 20 epochs. Adam has Keras's defaults, the batch size is 32, pixels are
scaled to 0 to 1, and images are not augmented. The data are those of configs/signs.py.
"""

from ml_collections import ConfigDict

from resnet_jax.config import RECIPES, choose, load

PUBLISHED = {"2": "", "20": ""}


def get_config(epochs: str = "20") -> ConfigDict:
    """Returns the config of a variant of this recipe."""
    choose(epochs, PUBLISHED)
    config = load(RECIPES / "signs.py")
    config.batch_size = 32
    config.total = ConfigDict({"epochs": int(epochs)})
    config.model.name = "tutorial_keras_resnet50"
    config.model.overrides = ConfigDict()
    config.model.bn_group_size = "global"

    config.data.mean = (0.0, 0.0, 0.0)
    config.data.std = (1.0, 1.0, 1.0)
    config.data.train_crop = "center"
    config.data.flip = False

    config.optim.name = "keras_adam"
    config.optim.learning_rate = 1e-3
    config.optim.learning_rate_batch = 0
    config.optim.schedule = "constant"
    config.optim.warmup = ConfigDict({"epochs": 0})
    config.optim.weight_decay = 0.0
    return config
