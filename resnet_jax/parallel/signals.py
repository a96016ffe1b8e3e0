"""SIGTERM, Ctrl-C and SIGHUP, and the end of this process.

A command calls `listen` before it imports anything else, so this module imports little.
From then on each of these signals ends the process at once, with 128 + its number as
exit code, unless `defer_to` has set a function because there is something to save.

Python runs a signal handler only when its main thread executes Python code again, and
that thread may run C code for minutes or hold a lock that the end needs. So the
handlers do nothing. Python also writes the number of each signal to a socket
(`signal.set_wakeup_fd`), from which another thread reads it and acts.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import NoReturn

from resnet_jax.console import output

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds within which two SIGINTs count as one Ctrl-C: the program `timeout` sends a
# signal to the process and then to its group.
SAME_PRESS = 1.0
# Seconds that the end waits for a terminal or a pipe that nobody reads, and for each
# function of `at_end`, since a file server may not answer.
OUTPUT_TIMEOUT, CLEANUP_TIMEOUT = 1.0, 10.0

# Functions that are called however the process ends, such as one that releases a lock.
# The last one is called first.
at_end: list[Callable[[], None]] = []
# The thread that ends the process holds this lock until the process has ended.
ending = threading.Lock()

# Held while a signal is handled.
_acting = threading.Lock()
_listener: "Listener | None" = None
_deferred_to: Callable[[int], None] | None = None
# The time at which a signal began to end the process.
_began: float | None = None


class Listener:
    """Calls a function in its own thread for each signal, until `stop` is called.

    Only Python's main thread can create one. SIGINT and SIGHUP that are ignored stay
    ignored, since the shell starts background jobs in this way, and nohup all programs.

    Args:
      act: The function, which gets the number of the signal.
      numbers: The signals.
    """

    def __init__(self, act: Callable[[int], None], numbers: Collection[int] = STOPS):
        self._act = act
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(
            self._write.fileno(), warn_on_full_buffer=False
        )
        self._before = {}
        for number in numbers:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if number == signal.SIGTERM or not ignored:
                self._before[number] = signal.signal(number, _do_nothing)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while received := self._read.recv(1):
            # Python also writes the numbers of other signals that have handlers.
            if received[0] in self._before:
                self._act(received[0])

    def stop(self) -> None:
        """Restores the handlers that were set before."""
        for number, handler in self._before.items():
            # The handler is None if it was set in C, so that Python cannot restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)
        self._write.close()


def _do_nothing(*_) -> None:
    """Handles no signal itself; the listener's thread acts instead."""


def listen() -> None:
    """Lets signals end this process; a command calls it in its first lines."""
    global _listener
    _listener = Listener(_act)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Lets signals end this process while the context is open, unless they already do.

    The context does nothing in other threads than the main thread, which alone can set
    handlers.
    """
    global _listener
    if _listener or threading.current_thread() is not threading.main_thread():
        yield
        return
    _listener = listener = Listener(_act)
    try:
        yield
    finally:
        wait_if_ending()
        listener.stop()
        _listener = None


def is_listening() -> bool:
    """Returns whether `listen` is in effect, even if signals are deferred."""
    return _listener is not None


def defer_to(note: Callable[[int], None] | None) -> None:
    """Sets a function that is called for each signal instead of ending the process.

    It does not return if a signal is ending the process already.

    Args:
      note: The function, which gets the number of the signal. With None signals end
        the process again.
    """
    global _deferred_to
    with _acting:
        if _began is None:
            _deferred_to = note
            return
    wait_for_the_end()


def wait_if_ending() -> None:
    """Returns unless a signal is ending the process, which takes precedence."""
    with _acting:
        if _began is None:
            return
    wait_for_the_end()


def wait_for_the_end() -> NoReturn:
    """Waits until another thread has ended the process."""
    while True:
        time.sleep(60)


def _act(number: int) -> None:
    global _began
    with _acting:
        if _began is not None:
            if number == signal.SIGINT and time.monotonic() > _began + SAME_PRESS:
                os._exit(128 + number)
        elif _deferred_to is not None:
            _deferred_to(number)
        else:
            _began = time.monotonic()
            # Another thread ends the process, so that this one notices a second Ctrl-C.
            text = f"stopped by {signal.Signals(number).name}"
            ends = threading.Thread(target=end, args=(128 + number, text), daemon=True)
            ends.start()


@contextlib.contextmanager
def blocked(numbers: Collection[int] = STOPS) -> Iterator[None]:
    """Keeps these signals from threads and processes that are started inside.

    This process misses no signal: another thread gets it, or it is delivered when the
    context is left.

    Args:
      numbers: The signals.
    """
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def end(code: int, text: str) -> NoReturn:
    """Prints a line and ends the process, whatever its other threads do.

    Args:
      code: The exit code.
      text: The line, for standard error.
    """
    with ending:
        tell(text)
        leave(code)


def leave(code: int) -> NoReturn:
    """Ends the process after the functions of `at_end`; the caller holds `ending`."""
    for function in reversed(at_end):
        _try_within(CLEANUP_TIMEOUT, function)
    # This may not return: another thread may hold the lock of standard output while it
    # waits for a reader.
    _try_within(OUTPUT_TIMEOUT, output.flush)
    os._exit(code)


def tell(text: str) -> None:
    """Prints a line on standard error, if that is possible within a second."""
    _try_within(OUTPUT_TIMEOUT, lambda: output.note(text))


def _try_within(seconds: float, function: Callable[[], None]) -> None:
    """Calls a function in a thread; ignores errors, and that it does not return."""

    def call() -> None:
        with contextlib.suppress(Exception):
            function()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
