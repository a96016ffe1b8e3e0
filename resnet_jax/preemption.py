"""SIGTERM and Ctrl-C: noted at once, acted on where a run can stop cleanly."""

import signal

import jax
from jax.experimental import multihost_utils


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
    """

    def __init__(self):
        self._signal: int | None = None
        self._polls = 0
        self._before: dict = {}

    def __enter__(self) -> "Preemption":
        alone = jax.process_count() == 1
        for number in (signal.SIGTERM, signal.SIGINT) if alone else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _) -> None:
        self._signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        """Raises PreemptedError if the run was asked to stop."""
        self._polls += 1
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            self._polls
        ):
            raise PreemptedError(signal.SIGTERM)
        if self._signal is not None:
            raise PreemptedError(self._signal)
