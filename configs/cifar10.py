"""CIFAR-10 as He et al. 2015 prepare it; the base of the recipes for it.

python -m resnet_jax.main --config=configs/cifar10.py --workdir=runs/cifar10

arXiv:1512.03385, section 4.2: zeros around, random crops, flips; batches of 128, 64k
steps, rate 0.1, a tenth at 32k and at 48k. The paper subtracts the mean of each pixel;
here each channel's mean is subtracted, and it is divided by the deviation.
"""

from ml_collections import ConfigDict

from resnet_jax.config import defaults


def get_config() -> ConfigDict:
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
