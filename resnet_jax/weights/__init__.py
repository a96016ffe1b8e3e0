"""Reads and writes weights of other frameworks and of runs.

Each naming scheme has a file of its own, and `SCHEMES` has them by name. `naming.py`
defines what a scheme is, `load.py` and `save.py` use them, `card.py` describes weights,
and `trained.py` has the network that `resnet_jax.load` returns.
"""

import importlib
from typing import TYPE_CHECKING

from resnet_jax.weights import akamaster, bit, highway, keras, timm_torchvision, vgg

SCHEMES = {
    scheme.name: scheme
    for scheme in (
        *(
            timm_torchvision.RESNET,
            timm_torchvision.RESNET_V2,
            timm_torchvision.NORM_FREE,
            timm_torchvision.SEQUENTIAL,
            timm_torchvision.TRANSFORMERS,
        ),
        *(vgg.VGG, akamaster.AKAMASTER, bit.BIT, highway.HIGHWAY),
        *(keras.APPLICATIONS, keras.TUTORIAL),
    )
}

if TYPE_CHECKING:
    from resnet_jax.weights.card import Card, Prediction
    from resnet_jax.weights.trained import TrainedModel

__all__ = ["Card", "Prediction", "TrainedModel"]


def __getattr__(name: str):
    # Imported late, since the modules of these names import `SCHEMES` from here.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "trained" if name == "TrainedModel" else "card"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
