"""Process-level memory and garbage-collection settings."""

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator

# Options of mallopt(), from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def use_one_heap() -> None:
    """Lets threads that start from now on allocate from the main thread's heap.

    XLA's matrix multiplications on CPUs pack their operands into tens of MB, in
    threads. By default each thread has a heap of its own, which returns that memory to
    the system each time.
    """
    _set({M_ARENA_MAX: 1})


def keep_freed_memory() -> None:
    """Lets malloc keep freed memory instead of returning it to the system.

    A train step on CPUs allocates gigabytes and frees them. By default they return to
    the system, which hands them out again in zeroed pages of 4 KiB; that takes a third
    of the step. Other implementations of malloc than glibc's are left as they are.

    Threads that already have a heap of their own keep it. JAX's threads have one once
    JAX was asked for its devices, so `use_one_heap` must be called before.
    """
    use_one_heap()
    _set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 2**26})


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pauses Python's garbage collection, as a context manager or a decorator.

    Tracing a network creates millions of objects that stay. Searching them for garbage
    again and again takes a tenth of the time until the compiled step can be loaded. A
    single collection afterwards would take another tenth. So the objects are moved to
    the oldest generation instead, which Python collects only after many more objects
    were created.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            # Unfreezing moves all frozen objects to the oldest generation.
            gc.freeze()
            gc.unfreeze()
            gc.enable()


def _set(options: dict[int, int]) -> None:
    """Sets options of glibc's malloc, if the process uses it."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in options.items():
        libc.mallopt(option, value)
