"""ResNet-50 on ImageNet in 16 to 88 epochs, with FFCV's recipes.

python -m resnet_jax.main --config=configs/ffcv.py:88 --workdir=runs/ffcv88

Variants: 16, 24, 32, 40, 56 and 88 epochs. Source: the README of
github.com/libffcv/ffcv-imagenet, for 8 A100.

Images grow from 160 to 192 pixels between 74 % and 86 % of the epochs, which is FFCV's
schedule exactly for 88 epochs. FFCV blurs before a strided convolution, and excludes
parameters from weight decay whose names contain "bn"; here the blur comes after the
convolution, and all norms are excluded.
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults

PUBLISHED = {
    **{"16": "73.8", "24": "75.6", "32": "76.6"},
    **{"40": "77.2", "56": "78.0", "88": "78.4"},
}


def get_config(epochs: str = "88") -> ConfigDict:
    """Returns the config of this recipe."""
    choose(epochs, PUBLISHED)
    config = defaults.get_config()
    length = int(epochs)
    config.batch_size = 4096
    config.total = ConfigDict({"epochs": length})

    config.model.name = "resnet50"
    config.model.dtype = "bfloat16"
    config.model.bn_group_size = 512
    config.model.overrides.anti_alias = "blur"

    config.data.image_size = 192
    config.data.resize_schedule = ConfigDict(
        {
            "first": 160,
            "last": 192,
            "start": {"epochs": round(length * 65 / 88)},
            "end": {"epochs": round(length * 76 / 88)},
            "multiple": 32,
        }
    )
    config.data.eval_size = 256
    config.evaluate.views = "flip"

    config.optim.learning_rate = 1.7
    config.optim.learning_rate_batch = 4096
    config.optim.schedule = "triangular"
    config.optim.warmup = ConfigDict({"epochs": 2})
    config.optim.warmup_from = 1.7e-4
    config.optim.nesterov = False
    config.optim.weight_decay_exclude = "norm"
    config.label_smoothing = 0.1
    return config
