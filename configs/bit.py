"""BiT's networks on ImageNet: Kolesnikov et al. 2019 (arXiv:1912.11370).

python -m resnet_jax.main --config=configs/bit.py:50x1 --workdir=runs/bit

Variants: 50x1, 101x1, 50x3, 101x3, 152x2 and 152x4. Source: the config bit_i1k of
github.com/google-research/big_vision, which names no accuracy. For the larger networks
the paper publishes only the accuracy after pre-training on ImageNet-21k.
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults

PUBLISHED = dict.fromkeys(("50x1", "50x3", "101x1", "101x3", "152x2", "152x4"), "")


def get_config(network: str = "50x1") -> ConfigDict:
    """Returns the config of this recipe."""
    choose(network, PUBLISHED)
    config = defaults.get_config()
    config.batch_size = 4096
    config.model.name = f"resnetv2_{network}_bit"
    config.model.dtype = "bfloat16"
    config.data.mean = config.data.std = (0.5, 0.5, 0.5)

    config.optim.warmup = ConfigDict({"steps": 1000})
    config.optim.nesterov = False
    config.optim.weight_decay = 1.6e-3  # 1e-4 * batch size / 256
    config.optim.decay = "schedule"
    config.optim.weight_decay_exclude = "ndim<=1"
    config.optim.clip_norm = 1.0
    return config
