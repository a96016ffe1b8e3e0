"""ResNet-20 on Fashion-MNIST, 28x28 grey, 10 classes; takes minutes on a laptop.

python -m resnet_jax.prepare tfds:fashion_mnist
python -m resnet_jax.main --config=configs/fashion_mnist.py --workdir=runs/fashion

The recipe is this project's own.
"""

from ml_collections import ConfigDict

from resnet_jax.config import defaults


def get_config() -> ConfigDict:
    """Returns the config of this recipe."""
    config = defaults.get_config()
    config.batch_size = 128
    config.total = ConfigDict({"epochs": 3})

    config.model.name = "cifar_resnet20"

    config.data.source = "tfds:fashion_mnist"
    config.data.eval_split = "test"
    config.data.image_size = 28
    config.data.channels = 1
    config.data.mean = (0.2860,)
    config.data.std = (0.3530,)
    config.data.train_crop = "pad"
    config.data.pad = 2
    config.data.crop_fraction = 1.0

    config.optim.learning_rate = 0.2
    config.optim.warmup = ConfigDict({"epochs": 0.5})
    return config
