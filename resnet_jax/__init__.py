"""Residual networks in JAX: equal to their references, from a laptop to a pod."""

import signal
import sys

__version__ = "0.2.0"

# Python is about to run a command, `python -m resnet_jax.NAME`. Until that can answer
# to Ctrl-C, in `output.command`, it ends the process without a traceback.
if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)].startswith("resnet_jax.")
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
