"""Configs: their defaults, the files that describe them, and how they are changed.

A config of your own starts from the defaults or from a recipe that ships with
resnet_jax, and states how it differs:

>>> from resnet_jax.config import RECIPES, defaults, load
>>> def get_config():
...     config = defaults.get_config()  # or load(RECIPES / "r50.py")
...     config.batch_size = 64
...     return config

The defaults have each key with a comment: `resnet_jax/config/defaults.py`.
"""

from resnet_jax.config import defaults
from resnet_jax.config.durations import in_steps, to_steps
from resnet_jax.config.files import RECIPES, choose, find, load, rescaled_ema_decay
from resnet_jax.config.overrides import override, take_overrides
from resnet_jax.config.saved import as_json, as_text, differences, flatten, from_saved
from resnet_jax.config.variants import for_dry_run, for_evaluation

__all__ = [
    "RECIPES",
    "as_json",
    "as_text",
    "choose",
    "defaults",
    "differences",
    "find",
    "flatten",
    "for_dry_run",
    "for_evaluation",
    "from_saved",
    "in_steps",
    "load",
    "override",
    "rescaled_ema_decay",
    "take_overrides",
    "to_steps",
]
