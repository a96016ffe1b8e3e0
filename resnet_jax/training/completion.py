"""Fills the values that a config leaves empty, before anything else reads it.

The network and its input are those of the card of the initial weights, and the length
of the run depends on the number of training images. So a recipe can suit any weights
and any set of pictures (`configs/finetune.py`), and what is recorded is complete.
"""

import copy
import dataclasses

from ml_collections import ConfigDict

from resnet_jax.config import values
from resnet_jax.config.saved import from_saved
from resnet_jax.errors import UserError
from resnet_jax.models.zoo import get_entry, resolve
from resnet_jax.parallel import processes
from resnet_jax.persistence.checkpoints import Checkpoints
from resnet_jax.persistence.storage import Path, explaining_errors
from resnet_jax.training.freezing import ALL_BUT_HEAD
from resnet_jax.weights import load
from resnet_jax.weights.adapt import as_rgb_card
from resnet_jax.weights.card import default_card

# The network of a config that names neither a network nor weights, and the largest side
# of its images in pixels: small sets seldom repay the cost of more.
NETWORK, IMAGE_SIZE = "resnet18", 128
# The length of a run with and without initial weights: epochs, and the least number of
# steps. BiT's HyperRule (arXiv:1912.11370) has 500 steps for its smallest sets, and
# Kornblith et al. 2019 (arXiv:1805.08974) have 20,000 for all.
EPOCHS = {True: 20, False: 100}
LEAST_STEPS = {True: 300, False: 1000}
MOST_STEPS = 20_000


def complete(config: ConfigDict, workdir: Path | None = None) -> ConfigDict:
    """Returns a config whose network and input are known.

    The values of `values.BY_WEIGHTS` that are empty become those of the card of
    `config.init_from`. Without weights they are the usual ones of the network, by
    default a ResNet-18, for images of at most 128 px.

    Args:
      config: The config, which is not changed. It is returned if nothing is empty.
      workdir: The directory of the run. If it has a checkpoint and the weights cannot
        be read any more, the values are those that the checkpoint recorded.

    Raises:
      UserError: The weights cannot be read, or there are none and only the head is
        trained.

    Examples:
      >>> from resnet_jax.config import load
      >>> config = complete(load("configs/finetune.py"))
      >>> config.model.name, config.data.image_size
      ('resnet18', 128)
    """
    values.check(config)
    if not values.empty_keys(config):
        return config
    recorded = _recorded(workdir) if workdir else None
    try:
        chosen = _from_card(config)
    except UserError:
        # A run that has begun does not need its weights any more.
        if not recorded or recorded.init_from != config.init_from:
            raise
        chosen = recorded
    return _filled(config, chosen)


def as_completed(config: ConfigDict, run: ConfigDict) -> ConfigDict:
    """Returns a config whose empty values are those that a run was given.

    Args:
      config: The config, which is not changed.
      run: The config that the run recorded.
    """
    config = _filled(config, run)
    with config.ignore_type():
        config.total = config.total or run.total
        config.data.eval_split = config.data.eval_split or run.data.eval_split
    return config


def with_total(config: ConfigDict, train_size: int) -> ConfigDict:
    """Returns a config whose length is known.

    An empty `config.total` becomes 20 epochs with initial weights, and 100 without; but
    at least 300 or 1,000 steps, and at most 20,000.

    Args:
      config: The config, which is not changed. It is returned if it has a length.
      train_size: The number of training images.
    """
    if config.total:
        return config
    has_weights = bool(config.init_from)
    epochs, least = EPOCHS[has_weights], LEAST_STEPS[has_weights]
    steps = epochs * train_size / config.batch_size
    total = {"epochs": epochs}
    if not least <= steps <= MOST_STEPS:
        total = {"steps": least if steps < least else MOST_STEPS}
    config = copy.deepcopy(config)
    with config.ignore_type():
        config.total = ConfigDict(total)
    return config


def _filled(config: ConfigDict, chosen: ConfigDict) -> ConfigDict:
    """Returns a config whose empty values of `values.BY_WEIGHTS` are the chosen ones.

    If nothing is empty, the overrides of the network are the config's own.
    """
    empty = values.empty_keys(config)
    config = copy.deepcopy(config)
    with config.ignore_type():
        for key in empty:
            section, name = key.split(".")
            config[section][name] = chosen[section][name]
        if empty and config.model.name == chosen.model.name:
            overrides = {**chosen.model.overrides, **config.model.overrides}
            config.model.overrides = ConfigDict(overrides)
    return config


def _from_card(config: ConfigDict) -> ConfigDict:
    """Returns the sections `model` and `data` of the card of a config's weights."""
    name = config.model.name
    if config.init_from:
        card = load.read_card(
            config.init_from, model=name or None, **dict(config.model.overrides)
        )
    elif config.optim.freeze == ALL_BUT_HEAD:
        raise UserError(
            f"optim.freeze={ALL_BUT_HEAD} trains only the head, on the features of"
            " weights; name them with --config.init_from=WEIGHTS, such as"
            " timm:resnet50.a1_in1k."
        )
    else:
        size = min(get_entry(name or NETWORK).image_size, IMAGE_SIZE)
        card = default_card(name or NETWORK, image_size=size)
    spec = card.make_spec()
    # Pictures are read in colour for weights of neither one nor three channels.
    usual = spec.in_channels if spec.in_channels in (1, 3) else 3
    channels = config.data.channels or usual
    card = as_rgb_card(card).for_spec(dataclasses.replace(spec, in_channels=channels))
    # The user may have written another name of the same network.
    is_same = bool(name) and resolve(name) == card.network
    return ConfigDict(
        {
            "model": {
                "name": name if is_same else card.network,
                "overrides": card.overrides(),
            },
            "data": {
                "image_size": card.image_size,
                "channels": channels,
                "mean": card.mean,
                "std": card.std,
                "interpolation": card.interpolation,
                "crop_fraction": card.crop_fraction,
            },
        }
    )


def _recorded(workdir: Path) -> ConfigDict | None:
    """Returns the config that a run's newest checkpoint recorded, if it has one."""
    folder = workdir / "checkpoints"
    with explaining_errors(workdir):
        exists = folder.is_dir()
    # No process continues, and makes the folder, before all have looked for it.
    processes.check_same("checkpoints", {"the checkpoints of --workdir": exists})
    if not exists:
        return None
    with Checkpoints(folder) as saved:
        record = saved.newest_record()
    return from_saved(record["config"]) if record else None
