"""ResNet-RS on ImageNet: Bello et al. 2021 (arXiv:2103.07579).

python -m resnet_jax.main --config=configs/resnet_rs.py:200 --workdir=runs/rs200

Variants: the depth, from 50 to 420. Source: table 1 of the authors' TPU repository, at
the image sizes of `SIZES`.

The authors' RandAugment is TensorFlow's, which always applies two operations; this
recipe has timm's with a probability of 1 and the same magnitude. The running statistics
of batch norm have a decay rate of 0, but the EMA of the parameters includes them.
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults

SIZES = {
    **{"50": 160, "101": 192, "152": 256, "200": 256},
    **{"270": 256, "350": 320, "420": 320},
}
PUBLISHED = {
    **{"50": "78.8", "101": "81.2", "152": "83.0", "200": "83.4"},
    **{"270": "83.8", "350": "84.2", "420": "84.4"},
}


def get_config(depth: str = "50") -> ConfigDict:
    """Returns the config of this recipe."""
    choose(depth, PUBLISHED)
    config = defaults.get_config()
    config.batch_size = 4096
    config.total = ConfigDict({"epochs": 350})

    config.model.name = f"resnetrs{depth}"
    config.model.dtype = "bfloat16"
    config.model.scan_blocks = int(depth) >= 200
    config.model.overrides.zero_init_last = True
    config.model.overrides.norm_momentum = 0.0
    config.model.overrides.dropout = 0.4 if depth in ("350", "420") else 0.25
    if int(depth) >= 200:
        config.model.overrides.drop_path = 0.1
        config.model.overrides.drop_path_by = "stage"

    config.data.image_size = SIZES[depth]
    config.data.policy = f"rand-m{10 if depth == '50' else 15}-n2-p1.0"

    config.optim.nesterov = False
    config.optim.weight_decay = 4e-5
    config.optim.weight_decay_exclude = "norm"
    config.label_smoothing = 0.1
    config.ema_decay = 0.9999
    return config
