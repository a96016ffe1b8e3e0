"""Networks, as data (`ResNetSpec`), by name (`create_model`) and as modules (`ResNet`).

Examples:
  >>> module = resnet_jax.create_model("resnet50", num_classes=10)
  >>> resnet_jax.list_models("resnest2*")
  ['resnest26d', 'resnest200e', 'resnest269e']
"""

from resnet_jax.models.resnet import ResNet
from resnet_jax.models.spec import ResNetSpec
from resnet_jax.models.zoo import (
    ZOO,
    build,
    create_model,
    get_entry,
    get_spec,
    list_models,
)

__all__ = [
    "ZOO",
    "ResNet",
    "ResNetSpec",
    "build",
    "create_model",
    "get_entry",
    "get_spec",
    "list_models",
]
