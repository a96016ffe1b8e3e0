"""Convolution, batch norm and max pooling, computed the fastest way on each platform.

`conv.py`, `norm.py` and `pool.py` choose an implementation for the platform. The
context manager `plain_operations` turns the choice off: XLA's own operations are then
used everywhere, as `plain.py` writes them.
"""

from resnet_jax.kernels.platforms import plain_operations

__all__ = ["plain_operations"]
