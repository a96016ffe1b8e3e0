"""Makes both sides compute with all the bits of their types."""

import gc

import jax
import jax.numpy as jnp
import psutil
import pytest
import torch

# Without these, accelerators multiply float32 matrices in bfloat16 or TF32.
jax.config.update("jax_default_matmul_precision", "highest")
torch.set_float32_matmul_precision("highest")
torch.backends.cudnn.allow_tf32 = False
# Two tests run at a time.
torch.set_num_threads(1)


# GiB above which a process forgets what was compiled, and how much more it may take
# before it does so again: what is free does not always go back to the system.
LIMIT, MORE = [4.0], 3.0


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    """Keeps two tests at a time within the memory: hundreds of networks add up."""
    yield
    process = psutil.Process()
    if process.memory_info().rss > LIMIT[0] * 2**30:
        jax.clear_caches()
        gc.collect()
        LIMIT[0] = max(4.0, process.memory_info().rss / 2**30 + MORE)


@pytest.fixture
def in_float64(monkeypatch):
    """Lets our networks compute in float64, where they say float32 included.

    In float32, gradients of two correct programs differ by percents of an element: a
    rectifier whose input rounds to the other side of zero passes or stops its whole
    gradient. In float64 there are practically no such inputs.
    """
    monkeypatch.setattr(jnp, "float32", jnp.float64)
    with jax.enable_x64(True):
        yield
