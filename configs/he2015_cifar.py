"""Residual and plain networks on CIFAR-10: He et al. 2015, section 4.2.

python -m resnet_jax.main --config=configs/he2015_cifar.py:20 --workdir=runs/he20

Variants: 20, 32, 44, 56, 110 and 1202 layers, and plain20, plain32, plain44 and plain56
without shortcuts. Source: arXiv:1512.03385, table 6; the errors of plain networks are
only plotted, in figure 6.

The paper warms 110 layers up with a learning rate of 0.01 until the error is below
80 %, which takes about 400 steps; here the rate rises from 0.01 to 0.1 in 400 steps.
"""

from ml_collections import ConfigDict

from resnet_jax.config import RECIPES, choose, load

PUBLISHED = {
    **{"20": "91.25", "32": "92.49", "44": "92.83", "56": "93.03"},
    **{"110": "93.57", "1202": "92.07"},
    **{"plain20": "", "plain32": "", "plain44": "", "plain56": ""},
}


def get_config(network: str = "20") -> ConfigDict:
    """Returns the config of a variant of this recipe."""
    choose(network, PUBLISHED)
    config = load(RECIPES / "cifar10.py")
    plain = network.startswith("plain")
    config.model.name = network if plain else f"cifar_resnet{network}"
    if network in ("110", "1202"):
        config.optim.warmup = ConfigDict({"steps": 400})
        config.optim.warmup_from = 0.01
        config.model.scan_blocks = network == "1202"
    return config
