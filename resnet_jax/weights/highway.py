"""Names of the Highway networks, which no library has: our own, with torch's leaves."""

from resnet_jax.models.baselines import HighwaySpec
from resnet_jax.weights import timm
from resnet_jax.weights.naming import Rules, Scheme


def _rules(spec: HighwaySpec) -> Rules:
    layer = r"stage(?P<i>\d+)_layer(?P<j>\d+)/(?P<conv>conv|gate)"
    return [("head", "head"), (layer, "stages.{i_before}.{j_before}.{conv}")]


HIGHWAY = Scheme("highway", _rules, timm.LEAVES, timm.torch_layout)
