"""torchvision's newer recipe, which trained its weights IMAGENET1K_V2.

python -m resnet_jax.main --config=configs/torchvision_v2.py:resnet50 --workdir=runs/v2

Variants: a network of torchvision. Source: its table of weights, and its blog "How to
Train State-Of-The-Art Models Using TorchVision's Latest Primitives"; the accuracy is
the best of three runs and of all epochs. With repeated augmentation, an epoch holds a
quarter of the images, four times each.
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults, rescaled_ema_decay

PUBLISHED = {
    **{"resnet50": "80.858", "resnet101": "81.886", "resnet152": "82.284"},
    **{"resnext50_32x4d": "81.198", "resnext101_32x8d": "82.834"},
    **{"resnext101_64x4d": "83.246"},
    **{"wide_resnet50_2": "81.602", "wide_resnet101_2": "82.510"},
}


def get_config(network: str = "resnet50") -> ConfigDict:
    """Returns the config of this recipe."""
    choose(network, PUBLISHED)
    config = defaults.get_config()
    config.batch_size = 1024
    config.total = ConfigDict({"epochs": 600})
    config.model.name = f"torchvision_{network}"
    config.model.bn_group_size = 128

    config.data.image_size = 176
    config.data.eval_size = 224
    config.data.crop_fraction = 224 / 232
    config.data.policy = "trivial_wide"
    config.data.erase = 0.1
    config.data.repeats = 4

    config.optim.learning_rate = 0.5
    config.optim.learning_rate_batch = 1024
    config.optim.warmup_from = 0.005
    config.optim.per_epoch = True
    config.optim.nesterov = False
    config.optim.weight_decay = 2e-5
    config.optim.weight_decay_exclude = "norm"

    config.label_smoothing = 0.1
    config.mix.mixup_alpha = 0.2
    config.mix.cutmix_alpha = 1.0
    config.mix.rule = "torchvision"
    config.ema_every = 32
    config.ema_decay = rescaled_ema_decay(
        0.99998, batch_size=1024, every=32, epochs=600
    )
    config.ema_warmup = "copy"
    return config
