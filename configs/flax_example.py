"""ResNet-50 on ImageNet with the recipe of Flax's example.

python -m resnet_jax.main --config=configs/flax_example.py --workdir=runs/flax

Source: the README of examples/imagenet of github.com/google/flax, which has 76.54 % on
32 TPU v3 cores, 76.37 % on 8, and 76.72 % on 8 V100 in float32. Random crops are those
of torchvision here.
"""

from ml_collections import ConfigDict

from resnet_jax.config import defaults

PUBLISHED = {"": "76.54"}


def get_config() -> ConfigDict:
    """Returns the config of this recipe."""
    config = defaults.get_config()
    config.batch_size = 1024
    config.total = ConfigDict({"epochs": 100})

    config.model.name = "resnet50"
    config.model.dtype = "bfloat16"
    config.model.bn_group_size = "global"
    config.model.overrides.same_padding = True
    config.model.overrides.zero_init_last = True
    config.model.overrides.conv_init = "lecun_fan_in"
    config.model.overrides.norm_unbiased = False

    config.data.interpolation = "tf_bicubic"
    config.optim.weight_decay_exclude = "ndim<=1"
    return config
