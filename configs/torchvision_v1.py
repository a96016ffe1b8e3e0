"""torchvision's first recipe, which trained its weights IMAGENET1K_V1.

python -m resnet_jax.main --config=configs/torchvision_v1.py:resnet50 --workdir=runs/v1

Variants: a network of torchvision. Source: its table of weights, and
references/classification in its repository. Users who ran the recipe again reached 75.4
to 75.9 with ResNet-50 (pytorch/vision#5593).
"""

from ml_collections import ConfigDict

from resnet_jax.config import choose, defaults

PUBLISHED = {
    **{"resnet18": "69.758", "resnet34": "73.314", "resnet50": "76.130"},
    **{"resnet101": "77.374", "resnet152": "78.312"},
    **{"resnext50_32x4d": "77.618", "resnext101_32x8d": "79.312"},
    **{"wide_resnet50_2": "78.468", "wide_resnet101_2": "78.848"},
}


def get_config(network: str = "resnet50") -> ConfigDict:
    """Returns the config of this recipe."""
    choose(network, PUBLISHED)
    config = defaults.get_config()
    epochs = 100 if network.startswith("resnext") else 90
    config.total = ConfigDict({"epochs": epochs})
    config.model.name = f"torchvision_{network}"

    config.optim.schedule = "step"
    config.optim.decay_at = ({"epochs": 30}, {"epochs": 60}, {"epochs": 90})
    if epochs == 90:
        config.optim.decay_at = config.optim.decay_at[:2]
    config.optim.warmup = ConfigDict({"epochs": 0})
    config.optim.nesterov = False
    return config
