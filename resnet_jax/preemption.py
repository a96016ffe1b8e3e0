"""SIGTERM and Ctrl-C: noted at once, acted on where a run can stop cleanly.

A run that does not come to such a place in time is ended from outside of it: when the
grace of a signal is over, and when it stalls.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time

from jax.experimental import multihost_utils

from resnet_jax import output, processes
from resnet_jax.checkpoints import newest_step
from resnet_jax.storage import Path, is_remote

# Seconds: of a GKE pod's and a spot machine's thirty, five are left for the exit; and
# what neither compiling nor saving a large network should take.
GRACE, STALL_TIMEOUT = 25.0, 1800.0
# What JAX's preemption service sets when any process got a SIGTERM.
_NOTICE = "RECEIVED_PREEMPTION_NOTICE"


class PreemptedError(Exception):
    """The run was asked to stop, and did.

    Attributes:
      exit_code: 128 + the number of the signal: 143 for SIGTERM, 130 for Ctrl-C.
    """

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


class Preemption:
    """Notes SIGTERM and SIGINT while it is entered; a second Ctrl-C kills.

    Schedulers may send SIGTERM more than once, so a second one changes nothing.

    With several processes JAX's own service notes SIGTERM on any of them and lets all
    stop at the same poll; so all must poll equally often.

    Args:
      workdir: whose newest checkpoint is told when the process must be ended.
      grace: seconds from a signal to the exit, whatever the run does; 0: no limit.
      stall_timeout: seconds without a poll after which the process prints where each
        thread is, and exits with 1; 0: no limit.
    """

    def __init__(
        self,
        workdir: Path,
        grace: float = GRACE,
        stall_timeout: float = STALL_TIMEOUT,
    ):
        self._workdir, self._grace, self._stall = workdir, grace, stall_timeout
        self._signal: int | None = None
        self._polls = 0
        self._polled = time.monotonic()
        self._before: dict = {}
        self._left = threading.Event()

    def __enter__(self) -> "Preemption":
        self._alone = processes.count() == 1
        for number in (signal.SIGTERM, signal.SIGINT) if self._alone else ():
            self._before[number] = signal.signal(number, self._note)
        if self._alone:
            # Handlers wait until the main thread runs Python again, and may never.
            self._read, self._write = socket.socketpair()
            self._write.setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._write.fileno())
        else:
            # JAX's handler stays; Ctrl-C does the same.
            self._before[signal.SIGINT] = signal.signal(
                signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM)
            )
        processes.listen(self._end_after_grace)
        threading.Thread(target=self._end_when_stalled, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._left.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._alone:
            signal.set_wakeup_fd(self._wakeup)
            self._write.close()

    def _note(self, number: int, _) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        """A sign of life; raises PreemptedError if the run was asked to stop."""
        self._polled = time.monotonic()
        self._polls += 1
        if not self._alone and multihost_utils.reached_preemption_sync_point(
            self._polls
        ):
            raise PreemptedError(signal.SIGTERM)
        if self._signal is not None:
            raise PreemptedError(self._signal)

    def _end_after_grace(self) -> None:
        number = self._wait_for_signal()
        # Process 0 ends last: without it, JAX aborts the others.
        early = 0.5 if processes.index() == 0 else 1.5
        if not number or not self._grace:
            return
        if self._left.wait(max(self._grace - early, 0.9 * self._grace)):
            return
        processes.end_now(
            128 + number,
            f"the run could not stop and save within --grace={self._grace:g}s of"
            f" {signal.Signals(number).name}; {self._last_checkpoint()}.",
        )

    def _wait_for_signal(self) -> int:
        """The number of the signal that came; 0 if the run ended without one."""
        if self._alone:
            while received := self._read.recv(1):
                if received[0] in (signal.SIGTERM, signal.SIGINT):
                    return received[0]
            return 0
        while not self._left.is_set():
            try:
                processes.client().blocking_key_value_get(_NOTICE, 60_000)
                return signal.SIGTERM
            except Exception as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    return 0  # the run has ended
        return 0

    def _end_when_stalled(self) -> None:
        while self._stall:
            left = self._polled + self._stall - time.monotonic()
            if left <= 0:
                break
            if self._left.wait(left):
                return
        else:
            return
        output.note("Where each thread is:")
        # A library may have no standard error.
        with contextlib.suppress(RuntimeError, AttributeError, OSError, ValueError):
            faulthandler.dump_traceback()
        if not self._alone:
            time.sleep(3)  # the other processes print theirs
        processes.end_all(
            f"no step ended for --stall_timeout={self._stall:g}s; where the threads"
            f" were stands above; {self._last_checkpoint()}."
        )

    def _last_checkpoint(self) -> str:
        if is_remote(self._workdir):
            # There is no time to ask, perhaps in vain.
            return "the same command goes on from the last checkpoint"
        step = newest_step(self._workdir)
        if step is None:
            return "there is no checkpoint yet, and the same command starts anew"
        return (
            f"the last checkpoint is that of step {step}, and the same command goes on"
            " from there"
        )
