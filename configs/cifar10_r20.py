"""ResNet-20 on CIFAR-10 in 64k iterations: He et al. 2015, section 4.2.

python -m resnet_jax.main --config=configs/cifar10_r20.py --workdir=runs/cifar10_r20

Published: 8.75 % error (table 6 of arXiv:1512.03385). Not run here. The paper
subtracts the mean of each pixel; here the mean of each channel is taken, and divided by
its standard deviation. Other depths: --config.model.name=cifar_resnet56.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
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
