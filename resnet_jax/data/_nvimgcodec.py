"""NVIDIA's image codecs, or None where they are not installed.

They decode a part of a JPEG, which no other kept package can. Without them, the whole
image is decoded, to the same pixels.
"""

import contextlib
import os


@contextlib.contextmanager
def _without_stderr():
    """Drops what libraries print to stderr, in a process that has one."""
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


# Silences its reports of missing GPU libraries and of broken files; this package
# reports broken files itself.
os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
try:
    with _without_stderr():
        from nvidia import nvimgcodec
except ImportError:
    nvimgcodec = None
