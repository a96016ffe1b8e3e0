"""ResNet-20 on scikit-learn's digits: a complete run in a minute on a laptop.

python -m resnet_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

The result is of an AMD EPYC with jax 0.10.2. On other CPUs rounding changes it by a
few of the 360 images.
"""

from ml_collections import ConfigDict

from resnet_jax.config import defaults

REACHED = {"": "99.44"}


def get_config() -> ConfigDict:
    """Returns the config of this recipe."""
    config = defaults.get_config()
    config.batch_size = 64
    config.total = ConfigDict({"epochs": 30})
    config.log_every = ConfigDict({"epochs": 1})

    config.model.name = "cifar_resnet20"

    config.data.source = "digits"
    config.data.eval_split = "test"
    config.data.image_size = 8
    config.data.channels = 1
    config.data.mean = (0.5,)
    config.data.std = (0.5,)
    config.data.train_crop = "pad"
    config.data.pad = 1
    config.data.flip = False  # a mirrored digit is not a digit
    config.data.crop_fraction = 1.0

    config.optim.warmup = ConfigDict({"epochs": 3})
    config.evaluate.every = ConfigDict({"epochs": 5})
    config.checkpoint.every = ConfigDict({"epochs": 5})
    return config
