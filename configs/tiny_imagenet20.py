"""ResNet-18 on 20 classes of Tiny-ImageNet: 64x64, 10,000 images, read from a folder.

The data are stored as data/tiny-imagenet-20/{train,val}/<wnid>/*.JPEG.

python -m resnet_jax.main --config=configs/tiny_imagenet20.py --workdir=runs/tiny

The recipe is this project's own.
"""

from ml_collections import ConfigDict

from resnet_jax.config import defaults


def get_config() -> ConfigDict:
    """Returns the config of this recipe."""
    config = defaults.get_config()
    config.batch_size = 128
    config.total = ConfigDict({"epochs": 30})

    config.model.name = "resnet18"
    config.model.overrides.zero_init_last = True

    config.data.source = "folder:data/tiny-imagenet-20"
    config.data.eval_split = "val"
    config.data.image_size = 64
    config.data.scale = (0.25, 1.0)
    config.data.crop_fraction = 1.0

    config.optim.warmup = ConfigDict({"epochs": 3})
    config.optim.weight_decay = 5e-4
    return config
