"""Eight CPU devices, and shapes in signatures checked, for every test."""

import os

# Before jax is imported anywhere.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"

from jaxtyping import install_import_hook

install_import_hook("resnet_jax", "beartype.beartype")
