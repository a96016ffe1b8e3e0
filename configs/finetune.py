"""Fine-tuning on your own pictures: any weights, a folder or a file of labels.

python -m resnet_jax.main --config=configs/finetune.py --workdir=runs/mine \
  --config.data.source=folder:PHOTOS --config.init_from=timm:resnet50.a1_in1k

The network, the image size, mean, std, interpolation and crop are those of the weights.
Without weights a ResNet-18 is trained at 128 px. A run has 20 epochs with weights and
100 without, but at least 300 or 1,000 steps, and at most 20,000. It warms up for 10 %
of its steps, and is evaluated 20 times. A file that cannot be decoded is
named, counted and skipped.
"""

from ml_collections import ConfigDict

from resnet_jax.config import defaults


def get_config() -> ConfigDict:
    """Returns the config of this recipe."""
    config = defaults.get_config()
    config.batch_size = 32
    config.total = ConfigDict()
    config.log_every = ConfigDict({"percent": 5})

    # Empty values are those of the weights; see resnet_jax/training/completion.py.
    config.model.name = ""
    config.model.bn_group_size = "global"
    config.data.image_size = 0
    config.data.channels = 0
    config.data.mean = config.data.std = ()
    config.data.interpolation = ""
    config.data.crop_fraction = 0.0

    config.data.source = "folder:data/photos"
    config.data.eval_split = ""
    config.data.scale = (0.35, 1.0)
    config.data.on_bad_image = "skip"

    config.optim.learning_rate = 0.01
    config.optim.learning_rate_batch = 32
    config.optim.warmup = ConfigDict({"percent": 10})
    config.label_smoothing = 0.1
    config.evaluate.every = ConfigDict({"percent": 5})
    config.checkpoint.every = ConfigDict({"percent": 5})
    return config
