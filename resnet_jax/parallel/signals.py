"""SIGTERM, Ctrl-C and SIGHUP, and the end of this process.

A command listens before it imports anything else, so this module imports little. From
then on each of these signals ends the process at once, with 128 + its number as exit
code, unless somebody defers them because there is something to save.

Python runs a signal handler only when its main thread runs Python again, and it may be
in C for minutes or hold a lock that the end needs. So the handlers do nothing, and a
thread that Python tells of each signal acts instead.
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
# Seconds in which two Ctrl-C are one: `timeout` sends a signal to the process and to
# its group.
SAME_PRESS = 1.0
# Seconds that the end waits for a terminal or a pipe that nobody reads, and for each
# function of `at_end`: a file server may not answer.
OUTPUT_WITHIN, CLEAN_WITHIN = 1.0, 10.0

# Functions to be called however the process ends, such as one that gives a lock back.
at_end: list[Callable[[], None]] = []
# Held by the thread that ends the process, until it has ended.
ending = threading.Lock()

# Held while a signal is acted on.
_acting = threading.Lock()
_listener: "Listener | None" = None
_deferred_to: Callable[[int], None] | None = None
# The time at which a signal began to end the process.
_began: float | None = None


class Listener:
    """Calls a function in a thread of its own for each signal, until it is stopped.

    Only Python's main thread may make one. SIGINT and SIGHUP stay ignored if they were:
    so the shell starts jobs in the background, and nohup starts all.

    Args:
      act: Called with the number of the signal.
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
            # Other signals that have handlers come here, too.
            if received[0] in self._before:
                self._act(received[0])

    def stop(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._before.items():
            # None stands for a handler in C, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup)
        self._write.close()


def _do_nothing(*_) -> None:
    """The handler of all signals; a thread acts on them."""


def listen() -> None:
    """Lets signals end this process from now on; for the first lines of a command."""
    global _listener
    _listener = Listener(_act)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Lets signals end this process inside, if they do not yet.

    Nothing changes outside of the main thread, which alone can have handlers.
    """
    global _listener
    if _listener or threading.current_thread() is not threading.main_thread():
        yield
        return
    listen()
    try:
        yield
    finally:
        wait_if_ending()
        _listener.stop()
        _listener = None


def is_listening() -> bool:
    """Returns whether signals end this process, or whom they were deferred to."""
    return _listener is not None


def defer_to(note: Callable[[int], None] | None) -> None:
    """Sets the function that is called for signals instead of ending the process.

    With None they end it again. Does not return if a signal is ending it already.
    """
    global _deferred_to
    with _acting:
        if _began is None:
            _deferred_to = note
            return
    wait_for_the_end()


def wait_if_ending() -> None:
    """Does not return if a signal is ending the process: that goes first."""
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
            # In a thread, so that a second Ctrl-C is heard.
            text = f"stopped by {signal.Signals(number).name}"
            ends = threading.Thread(target=end, args=(128 + number, text), daemon=True)
            ends.start()


@contextlib.contextmanager
def blocked(numbers: Collection[int] = STOPS) -> Iterator[None]:
    """Threads and processes that are started inside never get these signals.

    This process loses none: another thread gets it, or it comes at the exit.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end(code: int, text: str) -> NoReturn:
    """Prints a line and ends the process, whatever its other threads do."""
    with ending:
        tell(text)
        leave(code)


def leave(code: int) -> NoReturn:
    """Ends the process; the caller holds `ending`."""
    for function in list(at_end):
        _try_within(CLEAN_WITHIN, function)
    # Another thread may hold stdout and wait for a reader that does not read.
    _try_within(OUTPUT_WITHIN, output.flush)
    os._exit(code)


def tell(text: str) -> None:
    """Prints a line to stderr, if that is possible."""
    _try_within(OUTPUT_WITHIN, lambda: output.note(text))


def _try_within(seconds: float, function: Callable[[], None]) -> None:
    def call() -> None:
        with contextlib.suppress(Exception):
            function()

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
