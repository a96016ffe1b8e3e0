"""Measures a run: the throughput and mean metrics of its steps, and its start."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from resnet_jax.errors import UserError
from resnet_jax.persistence.checkpoints import Progress
from resnet_jax.persistence.metric_writers import Writer
from resnet_jax.training.experiment import Experiment

log = logging.getLogger(__name__)

# Share of the time that the devices may wait for data before a warning is logged.
MOST_WAITING = 0.05


class StartupTimer:
    """Measures the seconds from the command to the first step, split into parts.

    Args:
      began: The time of `time.perf_counter` when the command was given.
    """

    def __init__(self, began: float):
        self._began = self._last = began
        self._parts: dict[str, float] = {}

    def done(self, part: str) -> None:
        """Notes the time since the last part under a name."""
        now = time.perf_counter()
        self._parts[part], self._last = now - self._last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {took:.1f}" for part, took in self._parts.items())
        return f"first step after {self._last - self._began:.1f} s: {parts}"


class ThroughputMeter:
    """Collects the metrics of steps on the devices, and times the steps.

    Args:
      experiment: The experiment.
      progress: The run's progress; its `seconds` grow with each measurement.
      writer: The writer of the rows that are logged.
      clock: A function that returns the time in seconds.
    """

    def __init__(
        self,
        experiment: Experiment,
        progress: Progress,
        writer: Writer,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._experiment, self._progress, self._writer = experiment, progress, writer
        self._clock = clock
        self._pending: list[dict] = []
        self._rows: list[Callable[[], None]] = []
        self._settled = self._advised = False
        self.restart()

    def restart(self) -> None:
        """Restarts the clock, after work that is not training."""
        self._since, self._waited = self._clock(), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Measures how long the devices wait while a batch is fetched, for `with`.

        It first waits for all steps but the last, so that batches do not pile up on the
        devices. If the last step is still running when the batch is there, the devices
        did not wait.
        """
        if len(self._pending) > 1:
            jax.block_until_ready(self._pending[-2])
        started = self._clock()
        yield
        if not self._pending or self._pending[-1]["loss"].is_ready():
            self._waited += self._clock() - started

    def add(self, metrics: dict) -> None:
        """Notes the metrics of one step; they stay on the devices."""
        self._pending.append(metrics)

    def flush(self) -> None:
        """Waits for the noted steps and writes their means; raises as `settle`."""
        self.settle()
        rows, self._rows = self._rows, []
        for write in rows:
            write()
        if rows:
            self.restart()

    def settle(self) -> None:
        """Waits for the noted steps and takes their means, which `flush` writes.

        Raises:
          UserError: A loss or a gradient is not finite; the message names the steps.
        """
        if not self._pending:
            return
        steps = jax.device_get(self._pending)
        now, self._pending = self._clock(), []
        elapsed = now - self._since
        experiment, progress = self._experiment, self._progress
        first = progress.step - len(steps) + 1
        bad = [first + i for i, metrics in enumerate(steps) if not _are_finite(metrics)]
        if bad:
            raise UserError(
                f"The loss is not finite at step {bad[0]}"
                f"{f' and {len(bad) - 1} later ones' if len(bad) > 1 else ''}; nothing"
                " of it was saved. Try a smaller optim.learning_rate, a longer"
                " optim.warmup, optim.clip_norm=1, or model.dtype=float32: in another"
                " --workdir if this one has a checkpoint, from which"
                " --config.init_from=WORKDIR can start."
            )
        images = len(steps) * experiment.config.batch_size
        progress.seconds += elapsed
        means = {
            key: float(sum(metrics[key] for metrics in steps) / len(steps))
            for key in steps[0]
        }
        # The learning rate of the last step, whose update was made after one less.
        rate = experiment.learning_rate(progress.step - 1, progress.plateau)
        values = {
            **means,
            "epoch": progress.examples / len(experiment.train.source),
            "learning_rate": rate,
            "images_per_second": images / elapsed,
            "data_wait": self._waited / elapsed,
        }
        steps_left = experiment.total_steps - progress.step
        eta = steps_left * elapsed / len(steps)
        step = progress.step

        def write() -> None:
            self._advise(values["data_wait"])
            self._writer.train(step, values, eta=eta)

        self._rows.append(write)
        self.restart()

    def _advise(self, waiting: float) -> None:
        """Tells the user once what to change if the devices wait for data."""
        # The first steps also wait for the loader to start.
        settled, self._settled = self._settled, True
        if not settled or self._advised or waiting <= MOST_WAITING:
            return
        self._advised = True
        cores, devices = os.cpu_count() or 1, jax.local_device_count()
        remedies = f"more cores for each device than these {cores} for {devices}"
        if not self._experiment.trains_from_memory():
            remedies = (
                "images in memory, if they fit (--config.data.cache=ram);"
                f" {remedies}; and, for the next run, smaller files (python -m"
                " resnet_jax.prepare ... --max_side=400)"
            )
        log.warning(
            "The devices waited for images %.0f %% of the time. What helps: %s.",
            *(100 * waiting, remedies),
        )


def _are_finite(metrics: dict) -> bool:
    return bool(np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]))
