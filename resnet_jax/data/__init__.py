"""Reads data sets and makes batches of uint8 images.

An image goes through `sources.py` (the bytes of its file), `decode.py`, `crops.py`,
`resize.py`, `augment.py` and `loader.py` (the order of images, and batches). The
package imports no TensorFlow and uses no device.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from resnet_jax.data.source_protocol import Source

__all__ = ["Source"]


def __getattr__(name: str):
    # Worker processes that decode images need not import what sources need.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from resnet_jax.data.source_protocol import Source

    return Source
