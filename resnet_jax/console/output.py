"""Standard output, standard error and other by-products, whose failure ends no run.

`prepare` makes both streams safe for everything in the process that writes to them:
this package, `logging`, `warnings`, tqdm and the libraries. A stream that fails is
replaced by /dev/null. This module imports little besides the standard library, so that
it can be imported before everything else.
"""

import contextlib
import errno
import functools
import io
import logging
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from resnet_jax.errors import UserError

_DESCRIPTORS = {"stdout": 1, "stderr": 2}
_TITLES = {"stdout": "Standard output", "stderr": "Standard error"}
# Control characters, line separators, bidirectional overrides and surrogates. Control
# characters can command a terminal, and the others can disguise a text.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)

# Seconds of a wait after which the user is told what it waits for.
SILENCE = 5.0
# Seconds that a process in a hurry waits for the reader of its output.
_READER_TIMEOUT = 1.0
_in_a_hurry = threading.Event()

# The stream objects that failed, by name, each with its error.
_failures: dict[str, tuple[object, Exception]] = {}
# Names of failed streams whose failure has not been reported to the user yet.
_unreported: set[str] = set()


class _SafeFile(io.FileIO):
    """The descriptor of a standard stream; it accepts everything after it failed."""

    def __init__(self, name: str):
        super().__init__(_DESCRIPTORS[name], "w", closefd=False)
        self._stream_name = name

    def write(self, data) -> int:
        try:
            while True:
                # A pipe or terminal may be full. Data longer than PIPE_BUF would block
                # although there is room for a part of them.
                while not select.select([], [self], [], _READER_TIMEOUT)[1]:
                    if _in_a_hurry.is_set():
                        raise TimeoutError(errno.ETIMEDOUT, "Nobody reads it")
                written = super().write(memoryview(data)[: select.PIPE_BUF])
                # It is None where another program made the descriptor non-blocking.
                if written is not None:
                    return written
        except OSError as error:
            # Libraries in C++, child processes and Python's flush at exit write to the
            # descriptor too, so the descriptor itself is replaced.
            with open(os.devnull, "wb") as devnull:
                os.dup2(devnull.fileno(), self.fileno())
            _note_failure(self._stream_name, error)
            return memoryview(data).nbytes


class _Handler(logging.Handler):
    """Prints log records to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            note(self.format(record))
        except Exception:
            self.handleError(record)


def prepare() -> None:
    """Makes standard output, standard error and logging safe in this process.

    It is for programs, not for libraries, and can be called more than once.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Opening a file takes the lowest free number, which is that of the closed
            # stream. So no later file can get it, here or in child processes.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, descriptor in _DESCRIPTORS.items():
        stream = getattr(sys, name)
        if stream is not None:
            # With `python -u` the stream has no buffer.
            buffer = getattr(stream, "buffer", None)
            file = getattr(buffer, "raw", buffer)
            # The streams of notebooks and tests are objects of their own.
            if type(file) is not io.FileIO or file.closed:
                continue
            if file.fileno() != descriptor:
                continue
        safe = io.TextIOWrapper(
            io.BufferedWriter(_SafeFile(name)),
            encoding=getattr(stream, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, safe)
        setattr(sys, f"__{name}__", safe)
    logging.basicConfig(format="%(message)s", handlers=[_Handler()], force=True)


def command(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Runs a command of the package and exits with its code.

    Args:
      main: The function that gets the command line and returns an exit code, or None
        for 0. A UserError is printed as one sentence, with exit code 1. Ctrl-C leads to
        exit code 130.
    """
    prepare()
    sys.unraisablehook = functools.partial(_press_again, sys.unraisablehook)
    try:
        # `resnet_jax/__init__.py` says why Ctrl-C may have its default action here.
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        code = main(sys.argv)
    except UserError as error:
        fail(str(error))
        code = 1
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.exit(code)


def _press_again(hook: Callable[[Any], None], dropped: Any) -> None:
    """Sends Ctrl-C again if it came in a callback of C code, which drops exceptions."""
    if dropped.exc_type is KeyboardInterrupt:
        interrupt = (os.getpid(), signal.SIGINT)
        # No thread can start while Python exits, but then Ctrl-C has what it asks for.
        with contextlib.suppress(RuntimeError):
            threading.Timer(0.1, os.kill, interrupt).start()
    else:
        hook(dropped)


def say(text: str) -> None:
    """Prints a line on standard output, above the progress bar if one is shown."""
    _print("stdout", text)


def answer(text: str) -> None:
    """Prints the result for which a command was called, or ends the command.

    Raises:
      SystemExit: The result cannot be printed. If the reader of a pipe has closed it,
        as `head` does, the exit code is 141 and no error is printed: shells report this
        code for git, grep and other tools that SIGPIPE ends, and scripts with
        `set -o pipefail` expect it.
    """
    _print("stdout", text, report=False)
    failed = _failures.get("stdout")
    if failed is None or failed[0] is not sys.stdout:
        return
    _unreported.discard("stdout")
    if getattr(failed[1], "errno", None) == errno.EPIPE:
        raise SystemExit(128 + signal.SIGPIPE)
    fail(f"Standard output cannot be written: {reason_of(failed[1])}.")
    raise SystemExit(1)


def note(text: str) -> None:
    """Prints a line on standard error, above the progress bar if one is shown."""
    _print("stderr", text)


def warn(text: str) -> None:
    """Prints a warning on standard error."""
    note(f"warning: {text}")


def fail(text: str) -> None:
    """Prints an error on standard error."""
    note(f"error: {text}")


@contextlib.contextmanager
def telling(text: str, after: float = SILENCE) -> Iterator[None]:
    """Prints a line on standard error if the context is still open after some seconds.

    Args:
      text: The line, which says what the program waits for, and how long.
      after: The number of seconds.
    """
    timer = threading.Timer(after, note, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def flush() -> None:
    """Flushes both streams, for a process that ends by `os._exit`."""
    for name in _DESCRIPTORS:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            getattr(sys, name).flush()


def hurry() -> None:
    """Lets output that nobody reads fail from now on, since the process must end soon.

    Before this call the process waits as long as a reader such as `less` takes.
    """
    _in_a_hurry.set()


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""Returns a text with unsafe and unencodable characters replaced by escapes.

    For example, `printable("\x1b[31m")` is `r"\x1b[31m"`.

    Args:
      text: Any text, which may contain names of files and classes from strangers.
      encoding: The encoding of the terminal.
    """
    text = _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def one_line(text: str) -> str:
    r"""Returns a text with line breaks and tabs replaced by escapes such as `\n`.

    It is for lists with one line for each file or class, whose names may contain any
    character. `printable`, which all output passes through, escapes the others.
    """
    return text.replace("\n", r"\n").replace("\t", r"\t")


@contextlib.contextmanager
def dispensable(what: str, done: str = "written") -> Iterator[None]:
    """Turns any error inside the context into one warning.

    Args:
      what: The name of the by-product in the warning, such as the path of a file.
      done: The participle in the warning "... cannot be written".
    """
    try:
        yield
    except Exception as error:
        warn(f"{what} cannot be {done} ({reason_of(error)}). The work continues.")


class ByProduct:
    """An object that a run can do without, which is not used after its first failure.

    Args:
      name: The name of the by-product in the warning about its failure.
      make: Creates the object, or returns None if there is none.
    """

    def __init__(self, name: str, make: Callable[[], Any]):
        self._name, self._object = name, None
        with dispensable(name):
            self._object = make()

    def __bool__(self) -> bool:
        """Returns whether the object exists and has not failed."""
        return self._object is not None

    def use(self, action: Callable[[Any], Any]) -> None:
        """Calls a function with the object, unless it has failed before."""
        used, self._object = self._object, None
        if used is not None:
            with dispensable(self._name):
                action(used)
                self._object = used


def reason_of(error: Exception) -> str:
    """Returns the reason of a failure on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:300].rstrip(".")
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _print(name: str, text: str, report: bool = True) -> None:
    stream = getattr(sys, name)
    failed = _failures.get(name)
    if stream is not None and (failed is None or failed[0] is not stream):
        try:
            encoding = getattr(stream, "encoding", None) or "utf-8"
            with _above_progress_bar(stream):
                # This is a single write, since other threads print as well.
                stream.write(printable(text, encoding) + "\n")
                stream.flush()
        except Exception as error:
            # A stream object of a notebook or of the user may fail in any way.
            _note_failure(name, error)
    if report:
        _report_failures()


def _above_progress_bar(stream) -> contextlib.AbstractContextManager:
    # tqdm is not imported here, since no bar is shown before the package imports it.
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    # Lines that go to a file do not disturb a bar that is on a terminal.
    elsewhere = sys.stderr.isatty() and not stream.isatty() if sys.stderr else False
    if tqdm is not None and getattr(tqdm, "_instances", None) and not elsewhere:
        return tqdm.external_write_mode(stream)
    return contextlib.nullcontext()


def _note_failure(name: str, error: Exception) -> None:
    _failures[name] = getattr(sys, name), error
    _unreported.add(name)


def _report_failures() -> None:
    """Reports a failed stream on the other one, if that still works."""
    for name in tuple(_unreported):
        _unreported.discard(name)
        _, error = _failures[name]
        (remaining,) = _DESCRIPTORS.keys() - {name}
        _print(
            remaining,
            f"warning: {_TITLES[name]} cannot be written ({reason_of(error)}). Nothing"
            " more is printed there.",
            report=False,
        )
