"""Signals that ask a run to stop: it saves first, if there is something to save.

A run that does not come to a place where it can stop cleanly in time is ended from
outside of it: when the grace of a signal is over, and when it stalls.
"""

import contextlib
import faulthandler
import math
import signal
import threading
import time

from resnet_jax.console import output
from resnet_jax.errors import ResNetJaxError
from resnet_jax.parallel import processes, signals
from resnet_jax.persistence.checkpoints import newest_step
from resnet_jax.persistence.storage import Path, is_remote

# Seconds: of a GKE pod's and a spot machine's thirty, five are left for the exit; and
# what neither compiling nor saving a large network should take.
GRACE, STALL_TIMEOUT = 25.0, 1800.0
# Seconds in which output that nobody reads fails, and a run goes on without it.
READER_WITHIN = 5.0
# Seconds that JAX's preemption service takes to tell of a signal.
NOTICED_WITHIN = 3.0


class PreemptedError(ResNetJaxError):
    """The run was asked to stop, and did.

    Attributes:
      exit_code: 128 + the number of the signal: 143 for SIGTERM, 130 for Ctrl-C, 129
        for SIGHUP.
    """

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


class Preemption:
    """Notes the signals that ask a run to stop, while it is entered.

    Where a command listens to signals, they end the process at once until `hold` says
    that there is something to save; then they are noted, and `check` raises. In a
    program that calls this as a library they are always noted, and outside of its main
    thread never. A second Ctrl-C ends the process. Schedulers may send SIGTERM more
    than once, so a second one changes nothing.

    With several processes JAX's own service notes SIGTERM on any of them. They agree on
    the poll at which all stop, so all must poll equally often. Other signals become
    SIGTERM.

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
        self._pressed = 0.0
        # All processes poll equally often, and stop at the same poll.
        self._polls, self._last_poll = 0, math.inf
        self._polling = threading.Lock()
        self._polled = time.monotonic()
        self._held = False
        self._listener: signals.Listener | None = None
        self._noted, self._left = threading.Event(), threading.Event()

    def __enter__(self) -> "Preemption":
        self._alone = processes.count() == 1
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and not signals.is_listening():
            # JAX's handler of SIGTERM stays.
            self._listener = (
                signals.Listener(self._note)
                if self._alone
                else signals.Listener(processes.pass_on, (signal.SIGINT, signal.SIGHUP))
            )
        if not self._alone:
            processes.listen(self._await_notice)
        for function in (self._end_after_grace, self._end_when_stalled):
            threading.Thread(target=function, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._left.set()
        # Its thread waits for it, and ends.
        self._noted.set()
        if self._listener:
            self._listener.stop()
        elif self._alone and self._signal is None:
            signals.defer_to(None)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._pressed and now > self._pressed + signals.SAME_PRESS:
                stands = self._last_checkpoint()
                processes.end_now(
                    128 + number, f"a second Ctrl-C ended the run at once; {stands}."
                )
            self._pressed = self._pressed or now
        self._signal = self._signal or number
        self._noted.set()

    def _await_notice(self) -> None:
        if not processes.wait_for_notice():
            return
        # Meanwhile no process polls, so none passes the poll at which all stop. JAX's
        # `reached_preemption_sync_point` was seen to miss it where polls come fast.
        with self._polling:
            self._last_poll = processes.greatest("poll", self._polls) + 1
        self._signal = signal.SIGTERM
        self._noted.set()

    def hold(self) -> None:
        """From here on there is something to save, so that signals are only noted.

        Does not return if a signal is ending the process already.
        """
        if self._held:
            return
        if not self._alone:
            processes.hold()
        elif signals.is_listening():
            signals.defer_to(self._note)
        self._held = True

    def release(self) -> None:
        """All is saved; raises PreemptedError if a signal was noted meanwhile.

        Several processes go on to their end, since others may not be there yet.
        """
        if not self._alone:
            return
        if signals.is_listening():
            signals.defer_to(None)
        self._held = False
        if self._signal is not None:
            raise PreemptedError(self._signal)

    def check(self) -> None:
        """A sign of life; raises PreemptedError if the run was asked to stop."""
        self._polled = time.monotonic()
        if self._alone and self._signal is not None:
            raise PreemptedError(self._signal)
        with self._polling:
            self._polls += 1
            if self._polls >= self._last_poll:
                raise PreemptedError(signal.SIGTERM)

    def asked(self) -> PreemptedError | None:
        """The stop that a signal has asked for; None if none came."""
        if not self._alone:
            self._noted.wait(NOTICED_WITHIN)
        return None if self._signal is None else PreemptedError(self._signal)

    def _end_after_grace(self) -> None:
        self._noted.wait()
        if self._left.is_set():
            return
        output.hurry()
        # Process 0 ends last: without it, JAX aborts the others.
        early = 0.5 if processes.index() == 0 else 1.5
        if not self._grace:
            return
        if self._left.wait(max(self._grace - early, 0.9 * self._grace)):
            return
        processes.end_now(
            128 + self._signal,
            f"the run could not stop and save within --grace={self._grace:g}s of"
            f" {signal.Signals(self._signal).name}; {self._last_checkpoint()}.",
        )

    def _end_when_stalled(self) -> None:
        while self._stall:
            left = self._polled + self._stall - time.monotonic()
            if left <= 0:
                # A reader that reads no more may be all that the run waits for.
                output.hurry()
                if self._left.wait(READER_WITHIN):
                    return
                if self._polled + self._stall > time.monotonic():
                    continue
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
