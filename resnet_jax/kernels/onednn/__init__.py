"""Convolutions and products on CPUs by oneDNN (`pip install onednn-devel-cpu-gomp`).

XLA calls `calls.cc`, which a C++ compiler makes at the first use: a few seconds, kept
in the user's cache directory.
"""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import shlex
import subprocess
import sysconfig
import tempfile

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from resnet_jax.errors import UserError
from resnet_jax.persistence import user_cache

log = logging.getLogger(__name__)

SOURCE = pathlib.Path(__file__).with_name("calls.cc")  # It includes the *.h beside it.
# The names by which XLA knows the functions of the library.
TARGETS = {
    "resnet_jax_convolve": "ResnetJaxConvolve",
    "resnet_jax_multiply": "ResnetJaxMultiply",
}
CONVOLVE, MULTIPLY = TARGETS
DIRECTIONS = ("forward", "input", "kernel")
# Pixels from which oneDNN gains more than what it does with a kernel before costs.
MANY_PIXELS = 500


def computes(dtype: DTypeLike) -> bool:
    """Whether convolutions and products of a type on the CPU are left to oneDNN.

    Only where there is one CPU device in all: XLA cannot divide such a call among
    several. The first question may build the library.
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16) or not _single():
        return False
    return _library() is not None


def widens() -> bool:
    """Whether oneDNN multiplies bfloat16 as float32, which is faster on some CPUs.

    So it is on those without instructions for bfloat16, and on Intel's without AMX. The
    results are those of products of bfloat16 whose sums are of float32.
    """
    return computes(jnp.bfloat16) and bool(_library().ResnetJaxWidens())


def has_amx() -> bool:
    """Whether oneDNN multiplies bfloat16 by Intel's AMX."""
    return computes(jnp.bfloat16) and bool(_library().ResnetJaxHasAmx())


def rounds(dtype: DTypeLike) -> bool:
    """Whether `convolve` takes float32 kernels with images of a type, and rounds them.

    It reads them once, where a cast before it writes and reads them again; measured on
    CPUs with AMX alone.
    """
    return jnp.dtype(dtype) == jnp.bfloat16 and has_amx()


def convolve(
    direction: str, one: Array, other: Array, result: jax.ShapeDtypeStruct, where: tuple
) -> Array:
    """A direction of a convolution, without derivatives; `computes` was asked before.

    Args:
      direction: one of `DIRECTIONS`: what is computed.
      one: the image, or, for its own gradient, that of the output.
      other: the kernel, or, for its own gradient, that of the output; a kernel may be
        of float32 where it `rounds`.
      result: shape and type of what comes out.
      where: stride, dilation, and the pixels of padding above, below, left and right.
    """
    call = jax.ffi.ffi_call(CONVOLVE, result, vmap_method="sequential")
    number = np.int64(DIRECTIONS.index(direction))
    return call(one, other, direction=number, where=np.array(where, np.int64))


def multiply(
    left: Array, right: Array, contracted: tuple[int, int], result: jax.ShapeDtypeStruct
) -> Array:
    """A product of two matrices, without derivatives; `computes` was asked before.

    Args:
      left: a matrix.
      right: a matrix of the same type.
      contracted: the axis of each over which is summed.
      result: shape and type of what comes out.
    """
    ours, theirs = contracted
    call = jax.ffi.ffi_call(MULTIPLY, result, vmap_method="broadcast_all")
    return call(left, right, left_axis=np.int64(ours), right_axis=np.int64(theirs))


def _single() -> bool:
    try:
        return len(jax.devices("cpu")) == 1
    except RuntimeError:  # JAX_PLATFORMS leaves CPUs out.
        return False


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, known to XLA; None where oneDNN is not installed or of no use."""
    root = pathlib.Path(sysconfig.get_path("data"))
    if not (root / "include/oneapi/dnnl/dnnl.hpp").exists():
        return None
    try:
        library = ctypes.CDLL(str(_built(root)))
    except (UserError, OSError) as error:
        log.warning(
            "oneDNN is installed but not used, and convolutions are slower: %s."
            " It needs a C++ compiler with OpenMP, which the variable CXX may name.",
            error,
        )
        return None
    for target, function in TARGETS.items():
        handler = jax.ffi.pycapsule(getattr(library, function))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    return library


def _built(root: pathlib.Path) -> pathlib.Path:
    """Builds the library, unless it was; raises UserError, a clause without a stop.

    Args:
      root: the directory of oneDNN's `include` and `lib`.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    include = root / "include"
    command = [
        *(*compiler, "-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp"),
        *("-isystem", str(include), "-isystem", jax.ffi.include_dir(), str(SOURCE)),
        *(f"-L{root / 'lib'}", "-ldnnl", f"-Wl,-rpath,{root / 'lib'}"),
    ]
    version = (include / "oneapi/dnnl/dnnl_version.h").read_text()
    sources = [file.read_text() for file in sorted(SOURCE.parent.glob("*.[ch]*"))]
    parts = (*sources, jaxlib.__version__, version, *command)
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    directory = user_cache.directory() / "onednn"
    user_cache.claim(directory)
    path = directory / f"{name}.so"
    if path.exists():
        return path
    log.info("Building the call of oneDNN, once.")
    with tempfile.TemporaryDirectory(dir=directory) as made:
        new = pathlib.Path(made) / path.name
        try:
            done = subprocess.run(
                [*command, "-o", str(new)], capture_output=True, text=True
            )
        except OSError as error:
            raise UserError(f"{compiler[0]}: {error.strerror}") from None
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            why = (errors or done.stderr.splitlines() or ["no reason given"])[0]
            raise UserError(f"{compiler[0]} failed: {why.strip()}")
        # Of several processes that build it, the last one's stays.
        os.replace(new, path)
    return path
