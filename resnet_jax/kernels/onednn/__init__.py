"""Convolutions and matmuls on CPUs by oneDNN (`pip install onednn-devel-cpu-gomp`).

XLA calls the functions of `calls.cc`. A C++ compiler builds them at the first use,
which takes a few seconds, and the library is kept in the user's cache directory.
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
# From so many pixels on, oneDNN gains more time than it needs to reorder a kernel.
MANY_PIXELS = 500


def computes(dtype: DTypeLike) -> bool:
    """Returns whether oneDNN computes convolutions and products of a dtype on the CPU.

    It does only where there is a single CPU device, since XLA cannot divide such a call
    among several. The first call may build the library.
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16) or not _single_device():
        return False
    return _library() is not None


def widens() -> bool:
    """Returns whether oneDNN multiplies bfloat16 as float32.

    That is faster on CPUs without instructions for bfloat16, and on Intel's without
    AMX. The results are those of bfloat16 products whose sums are float32.
    """
    return _is_so("ResnetJaxWidens")


def has_amx() -> bool:
    """Returns whether oneDNN multiplies bfloat16 by Intel's AMX."""
    return _is_so("ResnetJaxHasAmx")


def rounds(dtype: DTypeLike) -> bool:
    """Returns whether `convolve` takes float32 kernels with images of a dtype.

    It then rounds the kernel while it reads it. A cast in advance would write the
    kernel and read it again. Only CPUs with AMX were measured.
    """
    return jnp.dtype(dtype) == jnp.bfloat16 and has_amx()


def convolve(
    direction: str,
    left: Array,
    right: Array,
    result: jax.ShapeDtypeStruct,
    geometry: tuple[int, ...],
) -> Array:
    """Computes a direction of a convolution, without derivatives.

    `computes` must have returned True for the dtype.

    Args:
      direction: `forward`, or `input` or `kernel` for the gradient with respect to it.
      left: The images, or for `input` the output's gradient.
      right: The kernel, or for `kernel` the output's gradient. A kernel may be float32
        where oneDNN `rounds` it.
      result: Shape and dtype of the result.
      geometry: Stride, dilation, and the pixels of padding above, below, on the left
        and on the right.
    """
    call = jax.ffi.ffi_call(CONVOLVE, result, vmap_method="sequential")
    number = np.int64(DIRECTIONS.index(direction))
    numbers = np.array(geometry, np.int64)
    return call(left, right, direction=number, geometry=numbers)


def multiply(
    left: Array, right: Array, contracted: tuple[int, int], result: jax.ShapeDtypeStruct
) -> Array:
    """Computes a product of two matrices, without derivatives.

    `computes` must have returned True for the dtype.

    Args:
      left: A matrix.
      right: A matrix of the same dtype.
      contracted: The axis of each matrix that is summed over.
      result: Shape and dtype of the product.
    """
    left_axis, right_axis = map(np.int64, contracted)
    call = jax.ffi.ffi_call(MULTIPLY, result, vmap_method="broadcast_all")
    return call(left, right, left_axis=left_axis, right_axis=right_axis)


def _is_so(question: str) -> bool:
    """Asks the library a question about this CPU, if bfloat16 is left to it."""
    library = _library() if computes(jnp.bfloat16) else None
    return library is not None and bool(getattr(library, question)())


def _single_device() -> bool:
    try:
        return len(jax.devices("cpu")) == 1
    except RuntimeError:  # JAX_PLATFORMS leaves CPUs out.
        return False


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Returns the library, registered with XLA, or None if oneDNN cannot be used."""
    root = pathlib.Path(sysconfig.get_path("data"))
    if not (root / "include/oneapi/dnnl/dnnl.hpp").exists():
        return None
    try:
        library = ctypes.CDLL(str(_build(root)))
    except (UserError, OSError) as error:
        log.warning(
            "oneDNN is installed but cannot be used, so convolutions are slower: %s."
            " It needs a C++ compiler with OpenMP; install one, or name it in the"
            " variable CXX.",
            error,
        )
        return None
    for target, function in TARGETS.items():
        handler = jax.ffi.pycapsule(getattr(library, function))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    return library


def _build(root: pathlib.Path) -> pathlib.Path:
    """Builds the library if it is not in the cache, and returns its path.

    Args:
      root: The directory of oneDNN's `include` and `lib`.

    Raises:
      UserError: The compiler failed. The message is part of a sentence.
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
    log.info("Building the library that calls oneDNN; this happens only once.")
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        new = pathlib.Path(folder) / path.name
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
        # If several processes build it, the last one's file replaces the others'.
        os.replace(new, path)
    return path
