"""Pre-activation networks on CIFAR-10: He et al. 2016 (arXiv:1603.05027).

python -m resnet_jax.main --config=configs/preact.py:164 --workdir=runs/preact164

Variants: 110, 164 and 1001 layers. Source: table 4; for 1001 layers, the median of 5
runs with a batch size of 64 (github.com/KaimingHe/resnet-1k-layers). The paper warms up
with a learning rate of 0.01 for 400 steps; here the rate rises from 0.01 to 0.1 in 400
steps.
"""

from ml_collections import ConfigDict

from resnet_jax.config import RECIPES, choose, load

PUBLISHED = {"110": "93.63", "164": "94.54", "1001": "95.38"}


def get_config(depth: str = "164") -> ConfigDict:
    """Returns the config of a variant of this recipe."""
    choose(depth, PUBLISHED)
    config = load(RECIPES / "cifar10.py")
    config.model.name = f"preact{depth}"
    config.optim.warmup = ConfigDict({"steps": 400})
    config.optim.warmup_from = 0.01
    if depth == "1001":
        config.batch_size = 64
        config.total = ConfigDict({"steps": 128_000})
        config.optim.decay_at = ({"steps": 64_000}, {"steps": 96_000})
        config.model.scan_blocks = True
    return config
