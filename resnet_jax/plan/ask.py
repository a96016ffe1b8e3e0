"""Asks a compiler in a process of its own, once: answers are kept on disk."""

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
from resnet_jax.errors import UserError, reason_of
from resnet_jax.persistence import user_cache, versions

# What cannot change a compiled step; of this package, only what asks the compiler can.
ASIDE = tuple(f"resnet_jax/{n}/" for n in ("analysis", "bench", "weights", "plan"))
ASKING = tuple(f"resnet_jax/plan/{n}.py" for n in ("compiled", "hlo"))
# libtpu must neither look for a TPU nor be kept from compiling by one that is in use.
FOR_TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}


def ask(
    config: ConfigDict,
    topology: str,
    *,
    per_chip: int = 0,
    evaluation: bool = True,
    fresh: bool = False,
) -> dict:
    """What a compiler says of a config on a topology: see `compiled.facts`.

    Args:
      config: see `resnet_jax/config/defaults.py`.
      topology: see `chips.chip_of`.
      per_chip: images a step and chip, in place of `config.batch_size`; 0: as there.
      evaluation: whether the evaluation step is compiled as well.
      fresh: compiles even if the answer is known.

    Raises:
      UserError: the config or the topology cannot be, or there is no libtpu.
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
    # Steps and hours depend on it, too.
    question = request | {"data": data_of(config)}
    try:
        known = user_cache.directory() / "plan" / f"{key_of(question)}.json"
        user_cache.claim(known.parent)
    except UserError as error:
        output.warn(f"answers are not kept: {error}")
        known = None
    if known and not fresh and (answer := _kept(known)):
        return answer
    found = _answer(request, FOR_TPU if tpu else {})
    found["versions"] = compiler_versions()
    if known:
        _keep(known, json.dumps(found))
    return found


def _kept(path: pathlib.Path) -> dict | None:
    """The answer of a file, or None if there is none that is whole."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        output.warn(f"{path} is damaged ({error}); compiling")
        return None
    whole = isinstance(found, dict) and {"train", "versions"} <= found.keys()
    return found if whole else None


def _answer(request: dict, environment: dict[str, str]) -> dict:
    config, batch = request["config"], request["per_chip"]
    images = f"{batch} images a chip" if batch else f"{config['batch_size']} images"
    output.note(
        f"compiling {config['model']['name']} for {request['topology']}, {images}"
        " (minutes for a large network)"
    )
    done = subprocess.run(
        [sys.executable, "-m", "resnet_jax.plan.compiled"],
        input=repr(request),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        code = done.returncode
        how = f"exit code {code}" if code >= 0 else f"ended by signal {-code}"
        raise UserError(
            f"The compiler failed for {request['topology']} ({how}):"
            f" {reason_of(done.stderr)}"
        ) from None
    if "error" in found:
        raise UserError(found["error"])
    for line in done.stderr.splitlines():
        if line.startswith("warning: "):
            output.note(line)
    return found


def _keep(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all; a disk that refuses costs only time."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        output.warn(f"{path}: {error.strerror}; not kept")


def data_of(config: ConfigDict) -> list[tuple[int, tuple[str, ...]]]:
    """Images and classes of both splits, but of data sets that need not be there.

    Raises UserError as `open_source`.
    """
    data = config.data
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
    """Names an answer by all that it depends on."""
    prefixes = ("JAX_", "XLA_", "LIBTPU_")
    environment = {k: v for k, v in os.environ.items() if k.startswith(prefixes)}
    parts = [repr(request), compiler_versions(), code(), sorted(environment.items())]
    if request["topology"] == LOCAL:
        parts.append(platform.node())
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def compiler_versions() -> dict[str, str]:
    """Of what has a say in how a program is compiled."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "libtpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def code() -> str:
    """A digest of the code that a compiled step comes from."""
    return versions.code_checksum(
        lambda name: name.startswith(ASIDE) and name not in ASKING
    )
