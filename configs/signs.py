"""A narrow ResNet-18 on photographs of hands that show 0 to 5: 64x64, 6 classes.

The data are 1,237 JPEGs of github.com/ardamavi/Sign-Language-Digits-Dataset, stored as
data/sign-digits/{train,test}/{0..5}/*.JPG, with 20 images per class in test.

python -m resnet_jax.main --config=configs/signs.py --workdir=runs/signs

The recipe is this project's own.
"""

from ml_collections import ConfigDict

from resnet_jax.config import defaults


def get_config() -> ConfigDict:
    """Returns the config of this recipe."""
    config = defaults.get_config()
    config.batch_size = 64
    config.total = ConfigDict({"epochs": 30})
    config.log_every = ConfigDict({"epochs": 1})

    config.model.name = "resnet18"
    # With half of ResNet-18's width a run takes minutes on a laptop's CPU.
    config.model.overrides.widths = (32, 64, 128, 256)
    config.model.overrides.stem = ((7, 2, 32),)
    config.model.overrides.zero_init_last = True

    config.data.source = "folder:data/sign-digits"
    config.data.eval_split = "test"
    config.data.image_size = 64
    config.data.scale = (0.5, 1.0)
    config.data.crop_fraction = 1.0

    config.optim.warmup = ConfigDict({"epochs": 3})
    config.optim.weight_decay = 5e-4
    config.evaluate.every = ConfigDict({"epochs": 5})
    config.checkpoint.every = ConfigDict({"epochs": 5})
    return config
