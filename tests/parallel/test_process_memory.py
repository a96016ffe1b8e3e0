"""Freed memory is kept, and garbage collection is paused."""

import gc
import platform
import subprocess
import sys

import pytest

from resnet_jax.parallel import process_memory

# JAX starts its threads when it is asked for its devices, so the order matters.
PREPARATIONS = {
    "training": """
from resnet_jax.parallel import process_memory
process_memory.use_one_heap()
import jax
assert jax.default_backend() == "cpu"
process_memory.keep_freed_memory()
""",
    "other commands": """
from resnet_jax.parallel import sharding
sharding.prepare_memory()
""",
}
# The script counts page faults of the second of two matrix multiplications.
MATMULS = """
import resource
import jax, jax.numpy as jnp
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
@pytest.mark.parametrize("command", PREPARATIONS)
def test_a_second_matmul_takes_no_new_memory_from_the_system(command):
    done = subprocess.run(
        [sys.executable, "-c", PREPARATIONS[command] + MATMULS],
        capture_output=True,
        text=True,
        check=True,
    )
    # The operands have 16,384 pages each; XLA packs them many times, in two threads.
    assert int(done.stdout) < 50_000


def test_garbage_is_collected_again_after_the_pause():
    @process_memory.gc_paused()
    def fails():
        assert not gc.isenabled()
        raise ValueError("inside")

    assert gc.isenabled()
    with process_memory.gc_paused(), pytest.raises(ValueError, match="inside"):
        fails()
    assert gc.isenabled()
    gc.disable()
    with process_memory.gc_paused():
        pass
    try:
        assert not gc.isenabled(), "it was disabled before"
    finally:
        gc.enable()


def test_objects_created_in_the_pause_are_in_the_oldest_generation():
    with process_memory.gc_paused():
        objects = [[] for _ in range(10_000)]
    old = set(map(id, gc.get_objects(generation=2)))
    assert old.issuperset(map(id, objects))
