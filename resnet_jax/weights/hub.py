"""Fetches timm's weights from the Hugging Face hub, such as `timm:resnet50.a1_in1k`.

Neither timm nor torch is needed.
"""

import logging
import os
import pathlib

from resnet_jax.errors import UserError
from resnet_jax.models.zoo import ALIASES, resolve

log = logging.getLogger(__name__)

PREFIX = "timm:"
WEIGHTS = "model.safetensors"
# The names of files of weights in a copy of a repository, the preferred one first.
FILES = (WEIGHTS, "pytorch_model.bin")


def fetch(address: str) -> pathlib.Path:
    """Fetches weights, with timm's `config.json` beside them, and returns their path.

    Files that are in the hub's cache are taken from there, without the network.

    Args:
      address: The weights as `timm:NAME.TAG`.

    Raises:
      UserError: The zoo has no such network, the hub has no such weights, or the hub
        cannot be reached and the cache has no copy.
    """
    name = address.removeprefix(PREFIX)
    name = ALIASES.get(name, name)
    resolve(name)
    if "." not in name:
        raise UserError(
            f"{address} names a network without the tag of its weights. Add a tag, such"
            f" as {PREFIX}{name}.a1_in1k; huggingface.co/timm lists them."
        )
    weights = _fetch_file(name, WEIGHTS)
    _fetch_file(name, "config.json")
    return weights


def _fetch_file(name: str, file: str) -> pathlib.Path:
    from huggingface_hub import constants, errors, hf_hub_download
    from huggingface_hub.utils import logging as hub_logging

    # Without a network, the library would log a warning for each retry.
    hub_logging.set_verbosity_error()
    repository = f"timm/{name}"
    page = f"{constants.ENDPOINT}/{repository}"
    try:
        try:
            path = hf_hub_download(repository, file, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            log.warning("Fetching %s from %s.", file, page)
            path = hf_hub_download(repository, file)
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{page} cannot be reached, and {file} of {repository} is not in"
            f" {constants.HF_HUB_CACHE}. Fetch {page}/resolve/main/{file} and"
            " config.json on a machine with a network, and give the file's path."
        ) from None
    except errors.EntryNotFoundError:
        raise UserError(
            f"{page} has no {file}, and other formats are not read from the hub. Fetch"
            " its weights and give the file's path."
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"There are no weights {name!r} at {page}. huggingface.co/timm lists those"
            " that exist."
        ) from None
    except errors.HfHubHTTPError as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{page} did not answer ({reason}). Try again later, or fetch {file} and"
            " give its path."
        ) from None
    except OSError as error:
        # Other errors than those of the file system keep their traceback.
        if error.strerror is None:
            raise
        raise UserError(
            f"{file} of {repository} cannot be kept in {constants.HF_HUB_CACHE}:"
            f" {error.strerror}. Set HF_HOME to use another directory."
        ) from None
    return pathlib.Path(os.path.abspath(path))
