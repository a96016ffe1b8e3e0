"""ResNet-20 on CIFAR-10 as in He et al. 2015; other recipes for CIFAR-10 build on it.

python -m resnet_jax.main --config=configs/cifar10.py --workdir=runs/cifar10

Source: arXiv:1512.03385, section 4.2. Images are padded with zeros, randomly cropped
and flipped. A run has 64k steps with a batch size of 128; the learning rate is 0.1 and
is divided by 10 at 32k and 48k steps. The paper subtracts the mean of each pixel; here
the mean of each channel is subtracted, and the result is divided by the standard
deviation.
"""

from ml_collections import ConfigDict

from resnet_jax.config import defaults


def get_config() -> ConfigDict:
    """Returns the config of this recipe."""
    config = defaults.get_config()
    config.batch_size = 128
    config.total = ConfigDict({"steps": 64_000})
    config.log_every = ConfigDict({"steps": 100})

    config.model.name = "cifar_resnet20"
    config.model.bn_group_size = "global"

    config.data.source = "tfds:cifar10"
    config.data.eval_split = "test"
    config.data.image_size = 32
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.train_crop = "pad"
    config.data.crop_fraction = 1.0

    config.optim.learning_rate_batch = 0
    config.optim.schedule = "step"
    config.optim.decay_at = ({"steps": 32_000}, {"steps": 48_000})
    config.optim.warmup = ConfigDict({"steps": 0})
    config.optim.nesterov = False
    return config
