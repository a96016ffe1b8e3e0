"""Residual networks in JAX that equal their references, from a laptop to a TPU pod.

>>> import resnet_jax
>>> resnet_jax.list_models("resnet5*d")
['resnet50d']
>>> resnet_jax.create_model("resnet50d", num_classes=10).spec.num_classes
10

The public names are those in `__all__` of this module and of `resnet_jax.config`,
`resnet_jax.data`, `resnet_jax.errors`, `resnet_jax.kernels`, `resnet_jax.models` and
`resnet_jax.weights`, with the attributes and public methods of their classes; a
network's only public method is its call. Everything else is private and may change in
any version.
"""

import importlib
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resnet_jax import config, data, errors, kernels, models, weights
    from resnet_jax.models.zoo import create_model, list_models
    from resnet_jax.training.loop import train
    from resnet_jax.weights.trained import load

__version__ = "0.2.0"

# If this is true, Python is about to run a command, `python -m resnet_jax.NAME`. Until
# the command handles Ctrl-C, in `output.command`, the signal ends the process without a
# traceback.
if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].startswith("resnet_jax.")
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

__all__ = [
    "config",
    "create_model",
    "data",
    "errors",
    "kernels",
    "list_models",
    "load",
    "models",
    "train",
    "weights",
]
# The modules of the functions. They import JAX, so they are imported at the first use.
_MODULES = {
    "create_model": "resnet_jax.models.zoo",
    "list_models": "resnet_jax.models.zoo",
    "load": "resnet_jax.weights.trained",
    "train": "resnet_jax.training.loop",
}


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    globals()[name] = value = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
