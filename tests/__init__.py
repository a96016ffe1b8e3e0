"""The tests. What one of them compiles, others find, whatever process they run in."""

import os
import tempfile

# Before jax is imported anywhere; the processes that run tests, and their runs, inherit
# it from the one that starts them, which removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="resnet_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
