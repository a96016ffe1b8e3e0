"""Checks a config for unknown names and contradictions, before any data are opened.

This is part of `training`, not of `config`, since the values of a config are names and
sizes of every subject. The optimiser, the loss and mixup check their own sections, and
are called here. `config/values.py` has the ranges of single values.
"""

from collections.abc import Collection

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_jax.config import values
from resnet_jax.data.augment import TRAIN_CROPS
from resnet_jax.data.cache import MODES as CACHES
from resnet_jax.errors import UserError, check_known
from resnet_jax.models import get_spec
from resnet_jax.models.zoo import Spec
from resnet_jax.parallel import sharding
from resnet_jax.training import losses, mixup, optim, stopping
from resnet_jax.training.datasets import eval_augment, train_augment

# The number of views of an image by the value of `evaluate.views`.
VIEWS = {"one": 1, "flip": 2, "ten_crop": 10}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def check(config: ConfigDict, mesh: Mesh) -> None:
    """Checks the values of a config for a run on some devices.

    Durations depend on the size of the training split, and are checked where they are
    turned into steps.

    Args:
      config: The run's config.
      mesh: The devices of the run.

    Raises:
      UserError: A value is wrong or contradicts another one.
    """
    values.check(config)
    sharding.check_batch_size("batch_size", config.batch_size, mesh)
    if config.evaluate.batch_size:
        key = "evaluate.batch_size"
        sharding.check_batch_size(key, config.evaluate.batch_size, mesh)
    _check_choices(config)
    _check_channels(config)
    train_augment(config)
    eval_augment(config, config.data.crop_fraction)
    optim.check(config)
    losses.check(config)
    mixup.check(config)
    stopping.check(config)
    spec = _check_network(config.model, "model.name", "model.overrides")
    if config.distill.teacher:
        _check_network(config.distill, "distill.teacher", "distill.overrides")
    if config.precise_bn and getattr(spec, "norm", None) != "batch":
        raise UserError(
            f"precise_bn={config.precise_bn} needs a residual network with batch"
            f" norm, which model.name={config.model.name} is not; set it to 0."
        )


def _check_network(section: ConfigDict, name_key: str, overrides_key: str) -> Spec:
    """Returns the spec of a network; an error begins with the key that caused it."""
    name, overrides = section[name_key.rpartition(".")[2]], section.overrides
    for key, fields in ((name_key, {}), (overrides_key, overrides)):
        try:
            spec = get_spec(name, **fields)
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    return spec


def _check_choices(config: ConfigDict) -> None:
    data = config.data
    choices: tuple[tuple[str, str, Collection[str]], ...] = (
        ("model.dtype", config.model.dtype, DTYPES),
        ("data.on_bad_image", data.on_bad_image, ("stop", "skip")),
        ("data.cache", data.cache, CACHES),
        ("data.train_crop", data.train_crop, TRAIN_CROPS),
        ("evaluate.views", config.evaluate.views, VIEWS),
        ("sharding.params", config.sharding.params, sharding.PARAMS),
    )
    for key, value, known in choices:
        check_known(f"{key}={value!r}", value, known)


def _check_channels(config: ConfigDict) -> None:
    data = config.data
    if data.channels not in (1, 3):
        raise UserError(f"data.channels={data.channels} must be 1 (grey) or 3 (RGB).")
    if not len(data.mean) == len(data.std) == data.channels:
        raise UserError(
            f"data.mean {tuple(data.mean)} and data.std {tuple(data.std)} must have"
            f" data.channels={data.channels} entries each."
        )
    if data.lighting and data.channels != 3:
        raise UserError(
            f"data.lighting={data.lighting} is noise on colours; it must be 0 with"
            f" data.channels={data.channels}."
        )
