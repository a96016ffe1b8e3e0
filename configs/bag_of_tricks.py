"""ResNet-50-D with a bag of tricks: He et al. 2018 (arXiv:1812.01187).

python -m resnet_jax.main --config=configs/bag_of_tricks.py --workdir=runs/tricks

Variants: cosine, smoothing, distill and mixup, each of which adds a trick to the ones
before it (mixup does without distill). Source: table 6 of the paper. `distill` learns
from ResNet-152-D, whose weights `distill.teacher_init` names.
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults

PUBLISHED = {
    **{"cosine": "77.91", "smoothing": "78.31"},
    **{"distill": "78.67", "mixup": "79.15"},
}


def get_config(tricks: str = "mixup") -> ConfigDict:
    """Returns the config of this recipe."""
    number = choose(tricks, PUBLISHED)
    config = defaults.get_config()
    config.batch_size = 1024
    config.total = ConfigDict({"epochs": 120})

    config.model.name = "resnet50d"
    config.model.dtype = "bfloat16"
    config.model.bn_group_size = 128
    config.model.overrides.zero_init_last = True

    config.data.color_jitter = (0.4, 0.4, 0.4, 0.0)
    config.data.lighting = 0.1

    config.optim.weight_decay_exclude = "norm+bias"
    if number >= 1:
        config.label_smoothing = 0.1
    if tricks == "distill":
        config.distill.teacher = "resnet152d"
        config.distill.teacher_init = "timm:resnet152d.gluon_in1k"
        config.distill.temperature = 20.0
    if tricks == "mixup":
        config.total = ConfigDict({"epochs": 200})
        config.mix.mixup_alpha = 0.2
    return config
