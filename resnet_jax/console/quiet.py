"""Silences what libraries print about failures that a command reports itself."""

import inspect
import logging
import sys
import threading

import absl.logging

from resnet_jax.console import output


def quiet_libraries() -> None:
    """Keeps libraries from reporting what this program reports in its own words.

    It changes the loggers and the hooks for exceptions of the whole process, so it is
    for programs and not for libraries.
    """
    # Orbax logs the traceback of each of its threads when a disk is full.
    absl.logging.get_absl_logger().addFilter(
        lambda record: "orbax" not in record.pathname
    )
    # gcsfs logs an error each time that it may not ask for the kind of a bucket, and
    # asyncio logs tasks that Orbax did not wait for.
    for name in ("gcsfs", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # When a worker fails, Python's resource tracker frees the shared memory and warns.
    sys.warnoptions.append("ignore:resource_tracker")
    # After a full disk or a broken file, many more failures follow the first one: in
    # threads and exit handlers of TensorBoard's writer, which is dispensable, and in
    # callbacks of TensorStore into event loops that Orbax has closed.
    threading.excepthook = sys.unraisablehook = _warn_in_one_line
    sys.excepthook = _print_unless_noise


def _is_noise(error: BaseException | None, source: object = None) -> bool:
    """Returns whether an error is only a consequence of one that was reported."""
    return str(error) == "Event loop is closed" or inspect.iscoroutine(source)


def _warn_in_one_line(failure) -> None:
    """Handles an exception of a thread, or one that cannot be raised."""
    if not _is_noise(failure.exc_value, getattr(failure, "object", None)):
        output.warn(str(failure.exc_value or "") or failure.exc_type.__name__)


def _print_unless_noise(kind, error, traceback) -> None:
    """Handles an exception that nothing has caught."""
    if not _is_noise(error):
        sys.__excepthook__(kind, error, traceback)
