"""Compiles the steps of a config in a subprocess, and keeps the figures on disk.

The subprocess runs `compile_steps`. A compiler for TPUs needs its environment variables
before JAX is imported, and it keeps what it has loaded.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from importlib import metadata

from ml_collections import ConfigDict

from resnet_jax.compiler.chips import LOCAL, chip_of
from resnet_jax.console import output
from resnet_jax.data.sources import KNOWN, open_source
from resnet_jax.data.splits import HELD_OUT
from resnet_jax.errors import UserError, reason_in_output
from resnet_jax.persistence import user_cache, versions

# Folders whose code cannot change a compiled step or the figures read from it, and the
# two files of this folder that can.
UNRELATED = tuple(f"resnet_jax/{n}/" for n in ("analysis", "bench", "weights", "plan"))
RELATED = tuple(f"resnet_jax/plan/{n}.py" for n in ("compile_steps", "hlo"))
# With this environment libtpu neither looks for a TPU nor fails since one is in use.
FOR_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


def compile_config(
    config: ConfigDict,
    topology: str,
    *,
    per_chip: int = 0,
    evaluation: bool = True,
    fresh: bool = False,
) -> dict:
    """Returns a compiler's figures for a config on a topology.

    Args:
      config: The run's configuration (`resnet_jax/config/defaults.py`).
      topology: The devices, such as `local`, `v5e:2x4` or `2*v5e:2x4`.
      per_chip: Images per step and chip. 0 takes `config.batch_size`.
      evaluation: Also compiles the evaluation step.
      fresh: Compiles even if the figures are on disk.

    Returns:
      The figures of `compile_steps.facts`, and `versions` (see `versions`).

    Raises:
      UserError: The config or the topology is not valid, libtpu is not installed, or
        the compiler failed.
    """
    tpu = bool(chip_of(topology))
    if tpu and not importlib.util.find_spec("libtpu"):
        raise UserError(
            f"Compiling for {topology} needs libtpu, the compiler for TPUs (no TPU is"
            " needed): pip install libtpu"
        )
    request = {
        "config": config.to_dict(),
        "topology": topology,
        "per_chip": per_chip,
        "evaluation": evaluation,
    }
    # The number of steps depends on the data, too.
    question = request | {"data": data_of(config)}
    try:
        known = user_cache.directory() / "plan" / f"{key_of(question)}.json"
        user_cache.claim(known.parent)
    except UserError as error:
        output.warn(f"The figures of this compilation are not kept: {error}")
        known = None
    if known and not fresh and (facts := _load(known)):
        return facts
    facts = _compile(request, FOR_TPU if tpu else {})
    facts["versions"] = compiler_versions()
    if known:
        _save(known, json.dumps(facts))
    return facts


def _load(path: pathlib.Path) -> dict | None:
    """Returns the figures in a file, or None if it is missing or damaged."""
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        output.warn(f"{path} is damaged ({error}). The steps are compiled again.")
        return None
    complete = isinstance(facts, dict) and {"train", "versions"} <= facts.keys()
    return facts if complete else None


def _compile(request: dict, environment: dict[str, str]) -> dict:
    """Runs `compile_steps` with a request; raises UserError if that fails."""
    config, batch = request["config"], request["per_chip"]
    images = f"{batch} images per chip" if batch else f"{config['batch_size']} images"
    output.note(
        f"compiling {config['model']['name']} for {request['topology']}, {images}"
        " (minutes for a large network)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "resnet_jax.plan.compile_steps"],
        input=repr(request),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        facts = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        code = done.returncode
        ending = f"exit code {code}" if code >= 0 else f"ended by signal {-code}"
        raise UserError(
            f"The compiler failed for {request['topology']} ({ending}):"
            f" {reason_in_output(done.stderr)}"
        ) from None
    if "error" in facts:
        raise UserError(facts["error"])
    for line in done.stderr.splitlines():
        if line.startswith("warning: "):
            output.note(line)
    return facts


def _save(path: pathlib.Path, text: str) -> None:
    """Writes a complete file or none; a failure is a warning, as it costs only time."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        output.warn(f"{path} cannot be written: {error.strerror}.")


def data_of(config: ConfigDict) -> list[tuple[int, tuple[str, ...]]]:
    """Returns the number of images and the classes of each split that is on disk.

    Data sets of known size (`KNOWN`) need not be on disk and are left out. Raises
    UserError if another one cannot be opened.
    """
    # Imported here, as it imports JAX, which other commands of this process need not.
    from resnet_jax.training.datasets import open_splits, resolve_splits

    config = resolve_splits(config)
    data = config.data
    if data.eval_split == HELD_OUT and data.source not in KNOWN:
        return [(len(source), source.classes) for source in open_splits(config)]
    splits = (
        (data.source, data.train_split),
        (data.eval_source or data.source, data.eval_split),
    )
    opened = [
        open_source(source, split, data_dir=data.data_dir)
        for source, split in splits
        if source not in KNOWN
    ]
    return [(len(source), tuple(source.classes)) for source in opened]


def key_of(request: dict) -> str:
    """Returns the name of a file of figures: a digest of all that they depend on."""
    prefixes = ("JAX_", "XLA_", "LIBTPU_")
    environment = {k: v for k, v in os.environ.items() if k.startswith(prefixes)}
    parts = [repr(request), compiler_versions(), code(), sorted(environment.items())]
    if request["topology"] == LOCAL:
        parts.append(platform.node())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def compiler_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect compilation."""
    version_of = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "libtpu"):
        try:
            version_of[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            version_of[name] = ""
    return version_of


def code() -> str:
    """Returns a digest of the code that determines a compiled step and its figures."""
    return versions.code_checksum(
        lambda name: name.startswith(UNRELATED) and name not in RELATED
    )
