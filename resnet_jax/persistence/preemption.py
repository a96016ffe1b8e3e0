"""Stopping a run on a signal, after saving what there is to save.

A run that does not reach a place where it can stop cleanly is ended by other threads:
when the grace period of a signal is over, and when the run stalls.
"""

import contextlib
import faulthandler
import math
import signal
import threading
import time

from resnet_jax.console import output
from resnet_jax.errors import ResNetJaxError, UserError
from resnet_jax.parallel import processes, signals
from resnet_jax.persistence.checkpoints import newest_step
from resnet_jax.persistence.storage import Path, is_remote

# The default of `grace`, in seconds: GKE pods and spot machines get 30 seconds, of
# which five are left for the exit.
GRACE = 25.0
# The default of `stall_timeout`, in seconds: longer than it takes to compile or to save
# a large network.
STALL_TIMEOUT = 1800.0
# Seconds within which output that nobody reads fails, so that a run resumes without it.
READER_WITHIN = 5.0
# Seconds within which a run that has lost its workdir must end by itself.
ENDED_WITHIN = 10.0
# Seconds that JAX's preemption service takes to report a signal.
NOTICED_WITHIN = 3.0


class PreemptedError(ResNetJaxError):
    """The run was asked to stop by a signal, and stopped.

    Attributes:
      exit_code: 128 + the number of the signal: 143 for SIGTERM, 130 for Ctrl-C, 129
        for SIGHUP.
    """

    def __init__(self, signal_number: int):
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


class Preemption:
    """Notes the signals that ask a run to stop, for as long as the context is open.

    Where a command listens to signals, they end the process at once until `hold` says
    that there is something to save. From then on they are noted, and `check` raises. In
    a program that uses this package as a library, signals are always noted, or never if
    this is called outside of its main thread. A second Ctrl-C ends the process. A
    second SIGTERM changes nothing, since schedulers may send more than one.

    With several processes JAX's preemption service notes a SIGTERM of any of them. The
    processes agree on the poll, which is a call of `check`, at which all stop, so all
    must poll equally often. Other signals are turned into SIGTERM.

    Args:
      workdir: The directory of the run, whose newest checkpoint is reported when the
        process must be ended.
      grace: Time from a signal to the exit, whatever the run does, in seconds. 0
        disables the limit.
      stall_timeout: Time without a poll after which the process prints the stack of
        each thread and exits with code 1, in seconds. 0 disables the limit.
    """

    def __init__(
        self,
        workdir: Path,
        grace: float = GRACE,
        stall_timeout: float = STALL_TIMEOUT,
    ):
        self._workdir, self._grace, self._stall = workdir, grace, stall_timeout
        self._signal: int | None = None
        self._failure = ""
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
            # With several processes JAX's handler of SIGTERM stays.
            self._listener = (
                signals.Listener(self._note)
                if self._alone
                else signals.Listener(
                    processes.forward_as_sigterm, (signal.SIGINT, signal.SIGHUP)
                )
            )
        if not self._alone:
            processes.listen(self._await_notice)
        for function in (self._end_after_grace, self._end_when_stalled):
            threading.Thread(target=function, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._left.set()
        # The thread of `_end_after_grace` waits for this event, and ends.
        self._noted.set()
        if self._listener:
            self._listener.stop()
        elif self._alone and self._signal is None:
            signals.defer_to(None)

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._pressed and now > self._pressed + signals.SAME_PRESS:
                message = self._last_checkpoint()
                processes.end_now(
                    128 + number, f"a second Ctrl-C ended the run at once; {message}."
                )
            self._pressed = self._pressed or now
        self._signal = self._signal or number
        self._noted.set()

    def _await_notice(self) -> None:
        if not processes.wait_for_notice():
            return
        # No process polls while it holds this lock, so none passes the poll at which
        # all stop. JAX's `reached_preemption_sync_point` was seen to miss that poll
        # where polls come fast.
        with self._polling:
            self._last_poll = processes.greatest("poll", self._polls) + 1
        self._signal = signal.SIGTERM
        self._noted.set()

    def hold(self) -> None:
        """Makes signals from now on wait for `check`, since there is something to save.

        It does not return if a signal is ending the process already.
        """
        if self._held:
            return
        if not self._alone:
            processes.hold()
        elif signals.is_listening():
            signals.defer_to(self._note)
        self._held = True

    def release(self) -> None:
        """Makes signals end the process at once again, since everything is saved.

        With several processes this does nothing: all run to their end, since others may
        not have reached this place.

        Raises:
          PreemptedError: A signal was noted meanwhile.
        """
        if not self._alone:
            return
        if signals.is_listening():
            signals.defer_to(None)
        self._held = False
        if self._signal is not None:
            raise PreemptedError(self._signal)

    def fail(self, text: str) -> None:
        """Ends the run from another thread, since it cannot save anything any more.

        A run of one process gets some time to raise the error where it polls next. But
        what it writes to an object store when it ends would create the workdir again.

        Args:
          text: The error.
        """
        if self._alone and not is_remote(self._workdir):
            self._failure = text
            if self._left.wait(ENDED_WITHIN):
                return
        processes.end_all(text)

    def check(self) -> None:
        """Polls for a signal, and shows that the run has not stalled.

        Raises:
          PreemptedError: The run was asked to stop.
          UserError: Another thread has called `fail`.
        """
        self._polled = time.monotonic()
        if self._failure:
            raise UserError(self._failure)
        if self._alone and self._signal is not None:
            raise PreemptedError(self._signal)
        with self._polling:
            self._polls += 1
            if self._polls >= self._last_poll:
                raise PreemptedError(signal.SIGTERM)

    def requested_stop(self) -> PreemptedError | None:
        """Returns the stop that a signal has asked for, or None if no signal came."""
        if not self._alone:
            self._noted.wait(NOTICED_WITHIN)
        return None if self._signal is None else PreemptedError(self._signal)

    def _end_after_grace(self) -> None:
        self._noted.wait()
        number = self._signal
        if self._left.is_set() or number is None:
            return
        output.hurry()
        # Process 0 ends last: when it ends, JAX aborts the other processes.
        early = 0.5 if processes.index() == 0 else 1.5
        if not self._grace:
            return
        if self._left.wait(max(self._grace - early, 0.9 * self._grace)):
            return
        processes.end_now(
            128 + number,
            f"the run could not stop and save within --grace={self._grace:g}s of"
            f" {signal.Signals(number).name}; {self._last_checkpoint()}.",
        )

    def _end_when_stalled(self) -> None:
        while self._stall:
            remaining = self._polled + self._stall - time.monotonic()
            if remaining <= 0:
                # The run may only be waiting for a reader of its output that stopped.
                output.hurry()
                if self._left.wait(READER_WITHIN):
                    return
                if self._polled + self._stall > time.monotonic():
                    continue
                break
            if self._left.wait(remaining):
                return
        else:
            return
        output.note("Stacks of all threads:")
        # A program that uses this package as a library may have no standard error.
        with contextlib.suppress(RuntimeError, AttributeError, OSError, ValueError):
            faulthandler.dump_traceback()
        if not self._alone:
            # Time for the other processes to print theirs.
            time.sleep(3)
        processes.end_all(
            f"no step ended for --stall_timeout={self._stall:g}s; the stacks of all"
            f" threads are printed above; {self._last_checkpoint()}."
        )

    def _last_checkpoint(self) -> str:
        """Returns a clause that says from where the same command resumes."""
        if is_remote(self._workdir):
            # There is no time to ask a store that may not answer.
            return "the same command resumes from the last checkpoint"
        step = newest_step(self._workdir)
        if step is None:
            return "there is no checkpoint yet, and the same command starts again"
        return (
            f"the last checkpoint is that of step {step}, from which the same command"
            " resumes"
        )
