"""This process on its host."""

import contextlib
import ctypes
import gc
import platform
from collections.abc import Iterator

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def use_one_heap() -> None:
    """Lets threads that start from now on take memory where the first one does.

    XLA's matrix products on CPUs pack what they take into tens of MB, in threads. Heaps
    of their own, which they would get, return that to the system each time.
    """
    _set({M_ARENA_MAX: 1})


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed, where it is glibc's.

    A step on CPUs takes gigabytes and frees them. By default they go back to the
    system, which hands them out anew in zeroed pages of 4 KiB: a third of the step.

    Threads that have a heap of their own by then go on with it; JAX's have, once it
    was asked for its devices. See `use_one_heap`.
    """
    use_one_heap()
    _set({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: 2**26})


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Puts Python's garbage collection off, as a context or a decorator.

    Tracing a network makes objects by the million that stay, and looking through them
    for garbage again and again is a tenth of the time until its step can be loaded.
    Doing so once behind it is another tenth; so they are old then, as what was frozen
    is, too: Python looks through those only when many more have come.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()
            gc.unfreeze()
            gc.enable()


def _set(options: dict[int, int]) -> None:
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in options.items():
        libc.mallopt(option, value)
