"""A linear probe of weights on your own pictures: only the head is trained.

python -m resnet_jax.main --config=configs/linear_probe.py --workdir=runs/probe \
  --config.data.source=folder:PHOTOS --config.init_from=timm:resnet50.a1_in1k

Everything else is as in configs/finetune.py: the network and its input are those of the
weights, and the length follows from the number of images. The features are those of
evaluation crops, since random crops made the probe worse on held-out training images of
three small sets. The rate is ten times that of fine-tuning, and there is neither weight
decay nor label smoothing.
"""

from ml_collections import ConfigDict

from resnet_jax.config import RECIPES, load


def get_config() -> ConfigDict:
    """Returns the config of this recipe."""
    config = load(RECIPES / "finetune.py")
    config.optim.freeze = "all_but_head"
    config.data.train_crop = "center"
    config.data.flip = False
    config.optim.learning_rate = 0.1
    config.optim.weight_decay = 0.0
    config.label_smoothing = 0.0
    return config
