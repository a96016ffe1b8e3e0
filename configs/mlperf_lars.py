"""ResNet-50 in large batches with LARS, as in MLPerf's reference convergence points.

python -m resnet_jax.main --config=configs/mlperf_lars.py:4096 --workdir=runs/lars

Variants: a batch size of 4096 or 32768. Source: the reference convergence points of
MLPerf training (mlcommons/logging, 4.0.0), which reach 75.9 % after 39 to 42 and after
55 to 57 epochs, respectively.
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults

PUBLISHED = {"4096": "75.9", "32768": "75.9"}


def get_config(batch_size: str = "4096") -> ConfigDict:
    """Returns the config of this recipe."""
    choose(batch_size, PUBLISHED)
    config = defaults.get_config()
    config.batch_size = int(batch_size)
    config.total = ConfigDict({"epochs": 42})

    config.model.name = "resnet50"
    config.model.dtype = "bfloat16"
    config.model.overrides.zero_init_last = True

    config.optim.name = "lars"
    config.optim.schedule = "polynomial"
    config.optim.power = 2.0
    config.optim.end_learning_rate = 1e-4
    config.optim.learning_rate = 10.0
    config.optim.learning_rate_batch = 0
    config.optim.warmup = ConfigDict({"epochs": 5})
    config.optim.weight_decay = 2e-4
    config.optim.weight_decay_exclude = "norm+bias"
    config.optim.nesterov = False
    config.label_smoothing = 0.1
    if batch_size == "32768":
        config.total = ConfigDict({"epochs": 57})
        config.optim.learning_rate = 21.2
        config.optim.warmup = ConfigDict({"epochs": 16})
        config.optim.momentum = 0.94
        config.optim.weight_decay = 2.5e-5
    return config
