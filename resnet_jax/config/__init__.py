"""Configs: the defaults, the files that describe configs, and changes to them.

A config of your own starts from the defaults or from a recipe that ships with
resnet_jax, and states how it differs:

>>> from resnet_jax.config import RECIPES, defaults, load
>>> def get_config():
...     config = defaults.get_config()  # or load(RECIPES / "r50.py")
...     config.batch_size = 64
...     return config

`python -m resnet_jax.keys` lists all keys with their meanings. The file of a config
runs as Python, so read a stranger's file before you load it.
"""

from resnet_jax.config import defaults
from resnet_jax.config.files import RECIPES, choose, load, rescaled_ema_decay
from resnet_jax.config.overrides import override

__all__ = ["RECIPES", "choose", "defaults", "load", "override", "rescaled_ema_decay"]
