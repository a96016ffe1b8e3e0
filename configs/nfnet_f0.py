"""NFNet-F0 on ImageNet: Brock et al. 2021 (arXiv:2102.06171).

python -m resnet_jax.main --config=configs/nfnet_f0.py --workdir=runs/nfnet

Source: table 3 of the paper. Images have 192 pixels in training and 256 in evaluation.
The paper's RandAugment has 4 operations of magnitude 5 (appendix A).
"""

from ml_collections import ConfigDict

from resnet_jax.config import defaults

PUBLISHED = {"": "83.6"}


def get_config() -> ConfigDict:
    """Returns the config of this recipe."""
    config = defaults.get_config()
    config.batch_size = 4096
    config.total = ConfigDict({"epochs": 360})

    config.model.name = "nfnet_f0"
    config.model.dtype = "bfloat16"
    config.model.overrides.drop_path = 0.25
    config.model.overrides.dropout = 0.2

    config.data.image_size = 192
    config.data.eval_size = 256
    config.data.interpolation = "bicubic"
    config.data.policy = "rand-m5-n4-p1.0"

    config.optim.agc = 0.01
    config.optim.weight_decay = 2e-5
    config.optim.weight_decay_exclude = "ndim<=1"
    config.label_smoothing = 0.1
    config.mix.mixup_alpha = 0.2
    config.mix.cutmix_alpha = 1.0
    config.ema_decay = 0.99999
    return config
