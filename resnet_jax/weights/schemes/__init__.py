"""Naming schemes of weights: a file for each framework.

`SCHEMES` has every `Scheme` that a file of this folder defines, by its name.
`resnet_jax/weights/naming.py` defines what a scheme is.
"""

import importlib
import pkgutil

from resnet_jax.weights.naming import Scheme

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for file in pkgutil.iter_modules(__path__)
    for scheme in vars(importlib.import_module(f"{__name__}.{file.name}")).values()
    if isinstance(scheme, Scheme)
}
