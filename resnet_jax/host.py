"""This process on its host."""

import ctypes
import platform

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed, where it is glibc's.

    A step on CPUs takes gigabytes and frees them. By default they go back to the
    system, which hands them out anew in zeroed pages of 4 KiB: a third of the step.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(M_TOP_PAD, 2**26)
