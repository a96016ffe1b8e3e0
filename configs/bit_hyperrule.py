"""Fine-tuning by BiT's HyperRule: Kolesnikov et al. 2019, section 3.3.

python -m resnet_jax.main --config=configs/bit_hyperrule.py:cifar10 --workdir=runs/tune

Variants: the data set, cifar10, cifar100 or imagenet2012. The initial weights are those
of BiT-M, trained on ImageNet-21k. Source: arXiv:1912.11370, and BiT-M R50x1 in the
README of github.com/google-research/big_transfer.

The rule: small images (an area below 96 x 96) are resized to 160 pixels and cropped to
128, others to 512 and 480. Above 20,000 examples, mixup has an alpha of 0.1. A run has
500 steps for less than 20,000 examples, 10,000 for less than 500,000, and 20,000 for
more. The authors resize to a square; here the short side is resized, which keeps the
aspect ratio.
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults

PUBLISHED = {"cifar10": "97.3", "cifar100": "86.5", "imagenet2012": "80.68"}


def get_config(dataset: str = "cifar10") -> ConfigDict:
    """Returns the config of this recipe."""
    choose(dataset, PUBLISHED)
    large = dataset == "imagenet2012"
    config = defaults.get_config()
    config.batch_size = 512
    steps = 20_000 if large else 10_000
    config.total = ConfigDict({"steps": steps})
    config.init_from = "timm:resnetv2_50x1_bit.goog_in21k"
    config.model.name = "resnetv2_50x1_bit"
    config.model.overrides.head_init_std = 0.0

    config.data.source = f"tfds:{dataset}"
    config.data.eval_split = "validation" if large else "test"
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)
    side, config.data.image_size = (512, 480) if large else (160, 128)
    config.data.train_crop = "short_side"
    config.data.short_side = (side, side)
    config.data.crop_fraction = 1.0

    config.optim.learning_rate = 0.003
    config.optim.learning_rate_batch = 512
    config.optim.schedule = "step"
    config.optim.decay_at = tuple({"steps": steps * k // 10} for k in (3, 6, 9))
    config.optim.warmup = ConfigDict({"steps": 500})
    config.optim.nesterov = False
    config.optim.weight_decay = 0.0
    config.mix.mixup_alpha = 0.1
    return config
