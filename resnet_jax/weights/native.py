"""Reads and writes weights under native names: weights directories and workdirs.

A weights directory holds `card.json` and the variables as an Orbax checkpoint.
"""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict
from orbax.checkpoint.metadata import ArrayMetadata

from resnet_jax.config.saved import from_saved
from resnet_jax.config.sizes import eval_image_size
from resnet_jax.errors import UserError
from resnet_jax.models.scan import unstack_blocks
from resnet_jax.models.spec import as_tuples
from resnet_jax.models.zoo import get_spec, resolve
from resnet_jax.persistence import storage
from resnet_jax.persistence.checkpoints import (
    DamagedError,
    open_checkpoints,
    orbax_options,
    restore_as_numpy,
)
from resnet_jax.persistence.storage import Path
from resnet_jax.weights.card import Card, default_card, from_json
from resnet_jax.weights.naming import check_buildable, check_shapes
from resnet_jax.weights.schemes.native import NATIVE
from resnet_jax.weights.stored import read_text

# The number of values in a chunk which every array may have.
MIN_CHUNK = 2**20


def is_weights_directory(path: Path) -> bool:
    """Returns whether a directory is a weights directory."""
    return (path / "card.json").is_file()


def is_workdir(path: Path) -> bool:
    """Returns whether a directory is the workdir of a run."""
    return (path / "checkpoints").is_dir()


def write(path: Path, variables: dict, card: Card) -> None:
    """Writes a weights directory, or replaces one.

    Args:
      path: The directory.
      variables: The collections `params` and `batch_stats`.
      card: The card of the variables, with the native naming scheme.

    Raises:
      UserError: The path exists and is not a weights directory, or it cannot be
        written.
    """
    with storage.explaining_errors(path):
        _write(path, variables, card)


def _write(path: Path, variables: dict, card: Card) -> None:
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not empty and not is_weights_directory(path):
        raise UserError(
            f"{path} exists and is not a weights directory; choose another path."
        )
    try:
        storage.make_directory(path)
        # The card is removed first and written last, so a directory with one is
        # complete.
        (path / "card.json").unlink(missing_ok=True)
        if (path / "variables").exists():
            epath.Path(path / "variables").rmtree()
        with ocp.StandardCheckpointer(**orbax_options(path)) as checkpointer:
            checkpointer.save(storage.absolute(path) / "variables", variables)
        storage.write(path / "card.json", card.to_json())
    except OSError as error:
        if storage.is_remote(path):
            raise
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


def read(path: Path) -> tuple[dict[str, np.ndarray], Card]:
    """Returns the variables of a weights directory by native names, and its card.

    Raises UserError if it is damaged.
    """
    card = from_json(read_text(path / "card.json"), str(path))
    folder = path / "variables"
    try:
        handler = ocp.PyTreeCheckpointHandler()
        declared = _flatten(handler.metadata(storage.absolute(folder)).tree)
        _check_declared(path, card, declared)
        variables = restore_as_numpy(folder, ("params", "batch_stats"))
    except UserError:
        raise
    except Exception as error:
        raise DamagedError(
            f"{path} is damaged: {_first_line(error)}. Write it again."
        ) from error
    return _flatten(variables), card


def _check_declared(
    path: Path, card: Card, declared: Mapping[str, ArrayMetadata]
) -> None:
    """Checks before anything is read that arrays are those of the card's network.

    Raises UserError if their names or shapes are others, or they are stored in chunks
    that are larger than they are, each of which takes its memory while it is read.
    """
    spec = card.make_spec()
    check_buildable(spec, declared, path)
    try:
        check_shapes({name: x.shape for name, x in declared.items()}, spec, NATIVE)
    except UserError as error:
        raise UserError(f"{path} does not fit {card.network}: {error}") from None
    for name, array in declared.items():
        chunk = array.storage.chunk_shape if array.storage else None
        if chunk and math.prod(chunk) > max(math.prod(array.shape), MIN_CHUNK):
            raise UserError(
                f"{path} is refused: {name!r} is stored in chunks of"
                f" {math.prod(chunk)} values, but has {math.prod(array.shape)}. Write"
                " it again."
            )


def read_workdir(path: Path) -> tuple[dict[str, np.ndarray], Card]:
    """Returns the variables of a run's best checkpoint by native names, and its card.

    The variables are the EMA if the run keeps one. Before the first
    evaluation the newest checkpoint counts as the best.

    Raises UserError if the run has no checkpoint or the best one is damaged.
    """
    with open_checkpoints(path) as saved:
        record, state = saved.load("best")
    card = _card_of_run(path, record)
    variables = state.get("ema") or state
    if record["config"]["model"].get("scan_blocks"):
        variables = unstack_blocks(variables, card.make_spec())
    return _flatten(variables), card


def _card_of_run(path: Path, record: Mapping[str, Any]) -> Card:
    config, progress = from_saved(record["config"]), record["progress"]
    name, data = resolve(config.model.name), config.data
    top1 = (progress["evaluation"] or {}).get("top1")
    return default_card(
        name,
        get_spec(name, **{key: as_tuples(x) for key, x in record["spec"].items()}),
        scheme=NATIVE.name,
        image_size=eval_image_size(config),
        mean=tuple(data.mean),
        std=tuple(data.std),
        interpolation=data.interpolation,
        crop_fraction=data.crop_fraction,
        bgr=False,
        classes=_classes(path, record),
        origin=f"{path}, step {progress['step']}",
        top1=None if top1 is None else 100 * top1,
    )


def _classes(path: Path, record: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the classes.

    Older versions recorded them only in the sample predictions of an evaluation.
    """
    if "data" in record:
        return tuple(record["data"]["classes"])
    predictions = path / "predictions.npz"
    if not predictions.exists():
        return ()
    with np.load(io.BytesIO(predictions.read_bytes())) as saved:
        return tuple(saved["classes"].tolist())


def _flatten(variables: dict) -> dict[str, Any]:
    """Returns variables by native names, which leave out the collection."""
    collections = {key: variables.get(key, {}) for key in ("params", "batch_stats")}
    return {"/".join(path[1:]): x for path, x in flatten_dict(collections).items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
