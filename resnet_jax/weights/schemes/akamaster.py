"""Names of akamaster/pytorch_resnet_cifar10: torchvision's, except for the head."""

from resnet_jax.models.spec import ResNetSpec
from resnet_jax.weights.naming import Rules, Scheme
from resnet_jax.weights.schemes import timm_torchvision


def _rules(spec: ResNetSpec) -> Rules:
    return [("head", "linear"), *timm_torchvision.RESNET.rules(spec)]


AKAMASTER = Scheme(
    "akamaster", _rules, timm_torchvision.LEAVES, timm_torchvision.torch_layout
)
