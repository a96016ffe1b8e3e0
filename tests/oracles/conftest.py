"""Makes jax and torch compute with the full precision of their types."""

import gc

import jax
import jax.numpy as jnp
import psutil
import pytest
import torch

# By default, accelerators multiply float32 matrices in bfloat16 or TF32.
jax.config.update("jax_default_matmul_precision", "highest")
torch.set_float32_matmul_precision("highest")
torch.backends.cudnn.allow_tf32 = False
# Two tests run at a time, so each has one core.
torch.set_num_threads(1)


# The memory in GiB above which a process drops its compiled programs, and the GiB more
# before it does so again, since freed memory does not always return to the system.
LIMIT, MORE = [4.0], 3.0


@pytest.fixture(autouse=True)
def drop_compiled_programs():
    """Bounds the memory of compiled programs, which hundreds of networks add up to."""
    yield
    process = psutil.Process()
    if process.memory_info().rss > LIMIT[0] * 2**30:
        jax.clear_caches()
        gc.collect()
        LIMIT[0] = max(4.0, process.memory_info().rss / 2**30 + MORE)


@pytest.fixture
def in_float64(monkeypatch):
    """Makes this project's networks compute in float64, even where they name float32.

    In float32, gradients of two correct programs differ by percents of an element: if
    the input of a rectifier rounds to the other side of zero, its whole gradient is
    passed or stopped. In float64 there are practically no such inputs.
    """
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield
