"""Networks: `create_model('resnet50', num_classes=10)`, `list_models('cifar*')`."""

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
