"""Names of torchvision's VGG networks, which number the layers of a `Sequential`."""

from resnet_jax.models.baselines import VGGSpec
from resnet_jax.weights.naming import Rules, Scheme
from resnet_jax.weights.schemes import timm_torchvision


def _rules(spec: VGGSpec) -> Rules:
    rules = [("hidden1", "classifier.0"), ("hidden2", "classifier.3")]
    rules += [("head", "classifier.6")]
    number = 0
    for i, size in enumerate(spec.stage_sizes, 1):
        for j in range(1, size + 1):
            rules.append((f"stage{i}_conv{j}", f"features.{number}"))
            rules.append((f"stage{i}_norm{j}", f"features.{number + 1}"))
            number += 3 if spec.batch_norm else 2
        # The pooling has a number, too.
        number += 1
    return rules


VGG = Scheme("vgg", _rules, timm_torchvision.LEAVES, timm_torchvision.torch_layout)
