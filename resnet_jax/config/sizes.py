"""Sizes of evaluations, which are those of training unless the config has others."""

from ml_collections import ConfigDict


def eval_image_size(config: ConfigDict) -> int:
    """Returns the side in pixels of the images that are evaluated.

    It may differ from that of the training images, as in FixRes (Touvron et al. 2019,
    arXiv:1906.06423).
    """
    return config.data.eval_size or config.data.image_size


def eval_batch_size(config: ConfigDict) -> int:
    """Returns the number of images of an evaluation batch, over all devices."""
    return config.evaluate.batch_size or config.batch_size
