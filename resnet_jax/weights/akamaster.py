"""Names of akamaster/pytorch_resnet_cifar10: torchvision's, except for the head."""

from resnet_jax.models.spec import ResNetSpec
from resnet_jax.weights import timm
from resnet_jax.weights.naming import Rules, Scheme


def _rules(spec: ResNetSpec) -> Rules:
    return [("head", "linear"), *timm.RESNET.rules(spec)]


AKAMASTER = Scheme("akamaster", _rules, timm.LEAVES, timm.torch_layout)
