"""timm's weights on the Hugging Face hub, without torch: `timm:resnet50.a1_in1k`."""

import logging
import os
import pathlib

from resnet_jax.errors import UserError
from resnet_jax.models.zoo import ALIASES, resolve

log = logging.getLogger(__name__)

PREFIX = "timm:"
WEIGHTS = "model.safetensors"


def fetch(where: str) -> pathlib.Path:
    """Returns the weights of `timm:NAME.TAG`, with timm's `config.json` beside them.

    What was fetched once is taken from the hub's cache, without the network.

    Raises:
      UserError: the zoo has no such network, the hub no such weights, or there is
        neither a way to the hub nor a copy in the cache.
    """
    name = where.removeprefix(PREFIX)
    name = ALIASES.get(name, name)
    resolve(name)
    if "." not in name:
        raise UserError(
            f"{where} does not say which weights: write a tag too, such as"
            f" {PREFIX}{name}.a1_in1k (huggingface.co/timm lists them)."
        )
    weights = _fetch_file(name, WEIGHTS)
    _fetch_file(name, "config.json")
    return weights


def _fetch_file(name: str, file: str) -> pathlib.Path:
    from huggingface_hub import constants, errors, hf_hub_download
    from huggingface_hub.utils import logging as hub_logging

    # It would warn of each retry where there is no network.
    hub_logging.set_verbosity_error()
    repository = f"timm/{name}"
    address = f"{constants.ENDPOINT}/{repository}"
    try:
        try:
            path = hf_hub_download(repository, file, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            log.warning("Asking %s for %s.", address, file)
            path = hf_hub_download(repository, file)
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"There is no way to the network, and {file} of {repository} is not in"
            f" {constants.HF_HUB_CACHE}: fetch {address}/resolve/main/{file} elsewhere,"
            " and config.json beside it, and give its path instead."
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(
            f"{address} has no {file}, and other files of it are not read."
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"There are no weights {name!r} at {address}; huggingface.co/timm lists"
            " what there is."
        ) from None
    except errors.HfHubHTTPError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{address} did not answer: {reason}") from None
    return pathlib.Path(os.path.abspath(path))
