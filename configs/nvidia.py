"""ResNet-50 on ImageNet with the recipe of NVIDIA's DeepLearningExamples.

python -m resnet_jax.main --config=configs/nvidia.py:90 --workdir=runs/nvidia90

Variants: 50, 90 and 250 epochs, the last with mixup. Source: the README of
PyTorch/Classification/ConvNets/resnet50v1.5, for A100 with mixed precision.
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults

PUBLISHED = {"50": "75.81", "90": "77.12", "250": "78.43"}


def get_config(epochs: str = "90") -> ConfigDict:
    """Returns the config of this recipe."""
    choose(epochs, PUBLISHED)
    config = defaults.get_config()
    config.batch_size = 2048
    config.total = ConfigDict({"epochs": int(epochs)})

    config.model.name = "resnet50"
    config.model.dtype = "bfloat16"
    config.model.bn_group_size = 256

    config.optim.learning_rate = 0.256
    config.optim.momentum = 0.875
    config.optim.nesterov = False
    config.optim.warmup = ConfigDict({"epochs": 8})
    config.optim.weight_decay = 1 / 32768
    config.optim.weight_decay_exclude = "norm"
    config.label_smoothing = 0.1
    if epochs == "250":
        config.mix.mixup_alpha = 0.2
    return config
