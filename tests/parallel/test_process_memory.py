"""Memory that is kept."""

import gc
import platform
import subprocess
import sys

import pytest

from resnet_jax.parallel import process_memory

# What a process of its own keeps of what it frees. As `main` does: JAX starts its
# threads when it is asked for its devices.
PRODUCTS = """
import resource
from resnet_jax.parallel import process_memory
process_memory.use_one_heap()
import jax, jax.numpy as jnp
assert jax.default_backend() == "cpu"
process_memory.keep_freed_memory()
product = jax.jit(lambda x: (x @ x + 1).sum())
x = jnp.ones((4096, 4096))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    product(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc's malloc")
def test_a_product_takes_no_new_memory_from_the_system_a_second_time():
    told = subprocess.run(
        [sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True
    )
    # The factors have 16,384 pages each; XLA packs them many times, in two threads.
    assert int(told.stdout) < 50_000


def test_garbage_is_collected_again_behind_what_keeps_it():
    @process_memory.gc_paused()
    def fails():
        assert not gc.isenabled()
        raise ValueError("on the way")

    assert gc.isenabled()
    with process_memory.gc_paused(), pytest.raises(ValueError, match="on the way"):
        fails()
    assert gc.isenabled()
    gc.disable()
    with process_memory.gc_paused():
        pass
    try:
        assert not gc.isenabled(), "as it was before"
    finally:
        gc.enable()


def test_what_was_made_while_garbage_was_kept_is_old():
    with process_memory.gc_paused():
        made = [[] for _ in range(10_000)]
    old = set(map(id, gc.get_objects(generation=2)))
    assert old.issuperset(map(id, made))
