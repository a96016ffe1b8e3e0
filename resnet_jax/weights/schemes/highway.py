"""Names of the Highway networks. No library has any, so they are in torch's style."""

from resnet_jax.models.baselines import HighwaySpec
from resnet_jax.weights.naming import Rules, Scheme
from resnet_jax.weights.schemes import timm_torchvision


def _rules(spec: HighwaySpec) -> Rules:
    layer = r"stage(?P<i>\d+)_layer(?P<j>\d+)/(?P<conv>conv|gate)"
    return [("head", "head"), (layer, "stages.{i_before}.{j_before}.{conv}")]


HIGHWAY = Scheme(
    "highway", _rules, timm_torchvision.LEAVES, timm_torchvision.torch_layout
)
