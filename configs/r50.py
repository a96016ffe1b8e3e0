"""ResNet-50 v1.5 on ImageNet in 90 epochs, as in Goyal et al. 2017 (arXiv:1706.02677).

python -m resnet_jax.main --config=configs/r50.py --workdir=runs/r50

Published: a top-1 error of 23.60 +- 0.12 % with a batch size of 256, and of 23.74 +-
0.09 % with 8192 (table 1 of the paper). The learning rate scales with the batch size,
so that `--config.batch_size=8192` is the paper's large-batch run. Not run here.

On a TPU pod, run the command on every host with `--distributed` and a --workdir that
all hosts see.
"""

from ml_collections import ConfigDict

from resnet_jax.config import defaults


def get_config() -> ConfigDict:
    """Returns the config of this recipe."""
    config = defaults.get_config()
    config.batch_size = 1024
    config.total = ConfigDict({"epochs": 90})

    config.model.name = "resnet50"
    config.model.dtype = "bfloat16"
    config.model.bn_group_size = 32  # images per worker in the paper, section 2.3
    config.model.overrides.zero_init_last = True  # section 5.1
    config.model.overrides.head_init_std = 0.01

    config.optim.schedule = "step"
    config.optim.decay_at = ({"epochs": 30}, {"epochs": 60}, {"epochs": 80})
    config.optim.warmup = ConfigDict({"epochs": 5})
    config.optim.warmup_from = 0.1  # gradual warm-up, section 2.2
    config.optim.weight_decay_exclude = "norm"
    return config
