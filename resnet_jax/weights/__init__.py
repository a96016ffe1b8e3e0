"""Reads and writes weights of other frameworks and of runs.

Each naming scheme has a file of its own in `schemes/`, and `SCHEMES` has them by name.
`naming.py` defines what a scheme is, `load.py` and `save.py` use them, `card.py`
describes weights, and `trained.py` has the network that `resnet_jax.load` returns.
"""

from resnet_jax.weights.card import Card, Prediction
from resnet_jax.weights.schemes import SCHEMES as SCHEMES
from resnet_jax.weights.trained import TrainedModel

__all__ = ["Card", "Prediction", "TrainedModel"]
