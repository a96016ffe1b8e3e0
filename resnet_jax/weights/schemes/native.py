"""Names of variables here, under which weights directories and workdirs keep them."""

from resnet_jax.weights.naming import Layout, Scheme
from resnet_jax.weights.schemes import timm_torchvision

NATIVE = Scheme(
    "resnet_jax",
    rules=lambda spec: [("(?P<module>.*)", "{module}")],
    leaves={leaf: leaf for leaf in timm_torchvision.LEAVES},
    layout=lambda path, rank: Layout(tuple(range(rank))),
    separator="/",
    ignored="",
)
