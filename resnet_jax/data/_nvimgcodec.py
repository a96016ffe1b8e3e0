"""NVIDIA's image codecs, or None where they are not installed.

Of all kept packages this one decodes a part of a JPEG; without it, pixels are the same.
"""

import contextlib
import os


@contextlib.contextmanager
def _without_stderr():
    """Drops what libraries print; where there is no stderr, there is nothing to do."""
    try:
        stderr = os.dup(2)
    except OSError:
        yield
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


# It tells of each GPU library that is missing, and of each broken file, which is ours.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
try:
    with _without_stderr():
        from nvidia import nvimgcodec
except ImportError:
    nvimgcodec = None
