"""Eight CPU devices, and shapes in signatures checked, for every test."""

import os
import signal

# Whoever runs tests in the background has them, and what they start, ignore Ctrl-C;
# nohup, SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# Before jax is imported anywhere.
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the tests' time is compiling: a quarter less, and slower programs.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import ctypes
import gc

import psutil
import pytest
from jaxtyping import install_import_hook

install_import_hook("resnet_jax", "beartype.beartype")

MOST_MEMORY = 2 * 2**30


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Turns the garbage collector off while tests are collected.

    Importing the libraries makes many objects that stay. The collector would scan them
    again and again, which takes a third of the time of the collection.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    """Gives each `long` test an hour; the others have `timeout` of pyproject.toml."""
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(3600), append=False)


@pytest.fixture(autouse=True)
def give_back_memory():
    """Gives back what glibc keeps of freed memory: up to ten gigabytes a process."""
    yield
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim and psutil.Process().memory_info().rss > MOST_MEMORY:
        trim(0)
