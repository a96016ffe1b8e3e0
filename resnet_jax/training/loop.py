"""Training from top to bottom: set up, restore, compile, step, log, evaluate, save."""

import contextlib
import logging
import os
import time
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from resnet_jax.config import load
from resnet_jax.console import output
from resnet_jax.data.arrays import Arrays, config_of_given, open_given
from resnet_jax.data.loader import WorkerDiedError, bad_indices
from resnet_jax.data.sources import Source, checksum
from resnet_jax.errors import UserError
from resnet_jax.models.cost import count
from resnet_jax.parallel import processes, sharding
from resnet_jax.persistence import metric_writers, storage, versions
from resnet_jax.persistence.checkpoints import Progress
from resnet_jax.persistence.metric_writers import Writer
from resnet_jax.persistence.preemption import (
    GRACE,
    STALL_TIMEOUT,
    PreemptedError,
    Preemption,
)
from resnet_jax.persistence.storage import path_of
from resnet_jax.persistence.workdir import claimed
from resnet_jax.reports import curves
from resnet_jax.reports.samples import SamplePredictions, save_samples
from resnet_jax.training.evaluation import Evaluation, evaluate, evaluate_sets
from resnet_jax.training.experiment import Setup, set_up, summary
from resnet_jax.training.initialization import (
    first_state,
    initial_weights,
    teacher_variables,
    teacher_weights,
)
from resnet_jax.training.optim import set_rate_factor
from resnet_jax.training.precise_bn import recompute_statistics
from resnet_jax.training.resume import (
    UNKNOWN,
    Resume,
    describe_data,
    describe_weights,
    run_checkpoints,
)
from resnet_jax.training.step import TrainState

log = logging.getLogger(__name__)

# Share of the time that devices may wait for data before the user is told.
MOST_WAITING = 0.05


class Start:
    """Seconds from the command to the first step, in parts."""

    def __init__(self, began: float):
        self._began = self._last = began
        self._parts: dict[str, float] = {}

    def done(self, part: str) -> None:
        """Notes what took the time since the part before."""
        now = time.perf_counter()
        self._parts[part], self._last = now - self._last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {took:.1f}" for part, took in self._parts.items())
        return f"first step after {self._last - self._began:.1f} s: {parts}"


class Meter:
    """Collects the metrics of steps on the devices until they are wanted."""

    def __init__(self, setup: Setup, progress: Progress, writer: metric_writers.Writer):
        self._setup, self._progress, self._writer = setup, progress, writer
        self._pending: list[dict] = []
        self._rows: list[Callable[[], None]] = []
        self._settled = self._advised = False
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew, after something that is not training."""
        self._since, self._waited = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting(self):
        """Around the fetching of a batch: notes how long the devices had to wait.

        Beforehand, all but the last step are waited for, so that batches do not pile
        up on the devices. If that one is not done when the batch is there, the devices
        did not wait.
        """
        if len(self._pending) > 1:
            jax.block_until_ready(self._pending[-2])
        started = time.perf_counter()
        yield
        if not self._pending or self._pending[-1]["loss"].is_ready():
            self._waited += time.perf_counter() - started

    def add(self, values: dict) -> None:
        """Notes the metrics of one step; they stay on the devices."""
        self._pending.append(values)

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

        Raises UserError if a loss is not finite, and names the steps.
        """
        if not self._pending:
            return
        steps = jax.device_get(self._pending)
        now, self._pending = time.perf_counter(), []
        elapsed = now - self._since
        config, progress = self._setup.config, self._progress
        first = progress.step - len(steps) + 1
        bad = [first + i for i, values in enumerate(steps) if not _finite(values)]
        if bad:
            raise UserError(
                f"The loss is not finite at step {bad[0]}"
                f"{f' and {len(bad) - 1} later ones' if len(bad) > 1 else ''}; nothing"
                " of it was saved. Try a smaller optim.learning_rate, a longer"
                " optim.warmup, optim.clip_norm=1, or model.dtype=float32: in another"
                " --workdir if this one has a checkpoint, from which"
                " --config.init_from=WORKDIR can start."
            )
        images = len(steps) * config.batch_size
        progress.seconds += elapsed
        means = {
            key: float(sum(values[key] for values in steps) / len(steps))
            for key in steps[0]
        }
        values = {
            **means,
            "epoch": progress.examples / len(self._setup.train.source),
            "learning_rate": float(self._setup.schedule(progress.step - 1))
            * (progress.plateau or {"factor": 1.0})["factor"],
            "images_per_second": images / elapsed,
            "data_wait": self._waited / elapsed,
        }
        left = self._setup.total_steps - progress.step
        eta = left * elapsed / len(steps)
        step = progress.step

        def write() -> None:
            self._advise(values["data_wait"])
            self._writer.train(step, values, eta=eta)

        self._rows.append(write)
        self.restart()

    def _advise(self, waiting: float) -> None:
        """Says once what to change if the devices wait for data."""
        # What the first steps wait for is the start of the loader.
        settled, self._settled = self._settled, True
        if not settled or self._advised or waiting <= MOST_WAITING:
            return
        self._advised = True
        log.warning(
            "The devices waited for images %.0f %% of the time. What helps: images in"
            " memory, if they fit (--config.data.cache=ram); more cores for each device"
            " than these %d for %d; and, for the next run, smaller files (python -m"
            " resnet_jax.prepare ... --max_side=400).",
            *(100 * waiting, os.cpu_count() or 1, jax.local_device_count()),
        )


def _finite(values: dict) -> bool:
    return bool(np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"]))


def train(
    config: ConfigDict | str | os.PathLike,
    workdir: str | os.PathLike,
    *,
    data: Source | Arrays | None = None,
    eval_data: Source | Arrays | None = None,
    callback: Callable[[dict], None] | None = None,
    extend: bool = False,
    command: str = "",
    began: float | None = None,
    grace: float = GRACE,
    stall_timeout: float = STALL_TIMEOUT,
) -> dict:
    """Trains a network, from the newest checkpoint of a workdir if it has one.

    >>> from resnet_jax.config import load, override
    >>> config = load("configs/quickstart.py")
    >>> override(config, ["--config.total.epochs=1", "--config.optim.warmup.steps=0"])
    >>> result = train(config, "runs/digits")  # doctest: +SKIP
    >>> images = np.random.default_rng(0).integers(0, 256, (640, 8, 8), np.uint8)
    >>> labels = images.mean(axis=(1, 2)) > 127
    >>> result = train(config, "runs/mine", data=(images, labels))  # doctest: +SKIP

    Args:
      config: The run's config (`resnet_jax/config/defaults.py`), or the file of one,
        such as `configs/r50.py`.
      workdir: The directory of this one run: a path, or `gs://...` or `s3://...`. It
        holds all that the run leaves. The same call resumes the run, and returns the
        result of a finished one.
      data: The training images in place of `config.data.source`: `(images, labels)`,
        with images uint8[n, h, w, c] or uint8[n, h, w] (or a list of paths, of bytes
        of image files, of pixels or of Pillow's images) and labels int[n] or names; or
        a `resnet_jax.data.Source`. The config's augmentation, `data.channels`,
        `data.mean` and `data.std` apply to them. All processes of a run need the same.
        A run resumes only with the same ones; of a source, the classes, the number of
        images and a sample of the labels are compared.
      eval_data: The images to evaluate on, with classes of the same names; None holds
        a fifth of `data` out of training, chosen by `config.seed`.
      callback: A function that takes the result of each evaluation (`step`, `top1`,
        `top5`, `loss`, `n_seen`, `sets`). All processes call it. An exception that it
        raises ends the run, which the same call resumes after that evaluation.
      extend: Whether a run may resume with a larger `config.total` although its
        learning rates depend on that; see `dependencies.Resume`.
      command: The command that repeats the run, for the result.
      began: The time of `time.perf_counter` when the command was given.
      grace: Seconds within which the run saves and ends after a signal.
      stall_timeout: Seconds without the end of a step after which the run ends.

    Returns:
      The content of `result.json`, and `report`: the path of the picture of the run, or
      None where it could not be drawn.

    Raises:
      UserError: The config, the data or the disk is at fault; the message says what to
        do.
      PreemptedError: A signal asked the run to stop; everything is saved.
    """
    if isinstance(config, str | os.PathLike):
        config = load(config)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config is {type(config).__name__}. Give a ConfigDict, such as what"
            " resnet_jax.config.load returns, or the path of a config file."
        )
    if not isinstance(workdir, str | os.PathLike):
        raise UserError(
            f"workdir is {type(workdir).__name__}. Give the path of a directory."
        )
    if callback is not None and not callable(callback):
        raise UserError(
            f"callback is {type(callback).__name__}. Give one function that takes the"
            " result of an evaluation."
        )
    splits = {}
    if data is not None:
        splits = open_given(data, eval_data, config)
        config = config_of_given(config)
    elif eval_data is not None:
        raise UserError("eval_data also needs data, the images to train on.")
    workdir = path_of(workdir)
    start = Start(time.perf_counter() if began is None else began)
    start.done("imports")
    with (
        Preemption(workdir, grace, stall_timeout) as preemption,
        contextlib.ExitStack() as stack,
    ):
        # Set up.
        setup = set_up(config, **splits)
        last = setup.total_steps
        chief = jax.process_index() == 0
        say = output.say if chief else lambda text: None
        stack.enter_context(claimed(workdir))
        say(summary(setup, workdir))
        saved = stack.enter_context(run_checkpoints(setup, workdir))
        about_data = describe_data(setup.train.source, setup.test.source)
        processes.check_same("data", {"their images": checksum(about_data)[:12]})
        record = saved.newest_record()
        # A finished run learns no more, so its teacher may be gone.
        finished = record and record["progress"]["step"] >= last
        teacher = None if finished else teacher_weights(setup)
        about_teacher = describe_weights(config.distill.teacher_init, teacher)
        if record:
            resume = Resume(workdir, record, setup, about_data, about_teacher)
            for note in resume.check(extend):
                say(note)
            about_teacher = about_teacher or record.get("teacher", UNKNOWN)
        start.done("data")

        # Restore.
        restored = saved.restore_latest(setup.state_like())
        if restored:
            state, progress = restored
            say(f"going on from the checkpoint of step {progress.step}")
            about_weights = record.get("init", UNKNOWN)
        else:
            weights = initial_weights(setup)
            state, progress = first_state(setup, weights), Progress()
            if weights:
                say(f"starting from the weights of {config.init_from}")
            about_weights = describe_weights(config.init_from, weights)
        saved.about |= {
            "data": about_data,
            "init": about_weights,
            "teacher": about_teacher,
        }
        # Of an extended run.
        progress.recomputed &= progress.step == last
        on_disk = progress.step if restored else None
        if chief:
            storage.write_json(workdir / "config.json", config.to_dict())
        writer = stack.enter_context(
            metric_writers.Writer(
                workdir, step=progress.step, total_steps=last, active=chief
            )
        )
        meter = Meter(setup, progress, writer)
        start.done("state")

        try:
            # Compile, while the first batches are made.
            preemption.check()
            say("compiling")
            if progress.step < last:
                batches = stack.enter_context(setup.train_batches(progress.step))
                teacher = teacher_variables(setup, teacher or teacher_weights(setup))
                size = setup.train_size(progress.step)
                train_step = setup.at(size).compile_train_step(teacher)
                preemption.check()
            eval_steps = setup.compile_eval_steps()
            preemption.check()
            start.done("compiling")

            first = progress.step
            meter.restart()
            while True:
                # Evaluate and save where the run stands. A restart begins here too,
                # and makes up for what the process before it did not reach.
                now = progress.step
                done = progress.evaluation and progress.evaluation["step"] == now
                to_evaluate = setup.due("evaluate", now) and not done
                to_save = setup.due("checkpoint", now) and on_disk != now
                if to_evaluate or to_save:
                    meter.flush()
                if now == last and config.bn_recompute and not progress.recomputed:
                    say(f"batch norm over {config.bn_recompute} batches")
                    state = recompute_statistics(
                        setup, state, after_batch=preemption.check
                    )
                    progress.recomputed = True
                if to_evaluate:
                    samples = SamplePredictions()
                    result = evaluate(
                        setup,
                        eval_steps[()],
                        state,
                        after_batch=preemption.check,
                        samples=samples,
                    )
                    sets = evaluate_sets(
                        setup, eval_steps, state, after_batch=preemption.check
                    )
                    note_evaluation(progress, result, sets, writer)
                    state = lower_rate(setup, state, progress)
                if to_evaluate or to_save:
                    preemption.hold()
                    writer.flush()
                    saved.save(state, progress)
                    on_disk = now
                    if to_evaluate and chief:
                        save_samples(workdir, samples, setup.classes)
                if to_evaluate and callback:
                    callback(dict(progress.evaluation))
                if to_evaluate or to_save:
                    meter.restart()
                if progress.step == last:
                    break

                # Progressive resizing: another size is another program.
                if setup.train_size(progress.step) != size:
                    meter.flush()
                    size = setup.train_size(progress.step)
                    say(f"compiling for {size} px")
                    train_step = setup.at(size).compile_train_step(teacher)
                    preemption.check()
                    meter.restart()

                # Step.
                with meter.waiting():
                    batch = next(batches)
                note_bad_images(progress, batch, setup)
                state, metrics = train_step(state, setup.to_devices(batch))
                progress.step += 1
                progress.examples += config.batch_size
                meter.add(metrics)
                if progress.step == first + 1:
                    jax.block_until_ready(metrics)
                    preemption.hold()
                    start.done("step")
                    say(str(start))

                # Log.
                writer.tick(progress.step)
                if setup.due("log", progress.step):
                    meter.flush()
                    saved.check()
                preemption.check()
            saved.wait()
            preemption.release()
        except (PreemptedError, WorkerDiedError) as error:
            stop = (
                error
                if isinstance(error, PreemptedError)
                else preemption.requested_stop()
            )
            if stop is None:
                raise
            if processes.count() > 1 and stop is not error:
                # The others stop at a step that this process cannot reach.
                processes.end_all(
                    f"{processes.describe()} was {stop}. {error}", stop.exit_code
                )
            # First of all to disk; a loss that is not finite raises here.
            meter.settle()
            # A step 0 is no more than its config, which makes it again.
            if progress.step and on_disk != progress.step:
                saved.save(state, progress)
            saved.wait()
            meter.flush()
            writer.flush()
            if progress.step:
                say(f"saved step {progress.step}; the same command goes on from there")
            raise stop from None

    result = {
        **progress.evaluation,
        "model": config.model.name,
        "params": count(state.params),
        "best": progress.best,
        "bad_train_images": len(sharding.union(set(progress.bad_images))),
        "seconds": progress.seconds,
        "images_per_second": progress.examples / max(progress.seconds, 1e-9),
        "command": command,
        "versions": versions.package_versions(),
    }
    picture = None
    if chief:
        with output.dispensable(str(workdir / "result.json")):
            storage.write_json(workdir / "result.json", result)
        with output.dispensable(str(workdir / "report.png")):
            picture = str(curves.draw(workdir, result))
    return result | {"report": picture}


def lower_rate(setup: Setup, state: TrainState, progress: Progress) -> TrainState:
    """The state with the learning rate that a plateau of the evaluations asks for."""
    if not setup.plateau:
        return state
    top1 = progress.evaluation["top1"]
    progress.plateau = setup.plateau.after(progress.plateau, top1)
    factor = progress.plateau["factor"]
    return state.replace(opt_state=set_rate_factor(state.opt_state, factor))


def note_evaluation(
    progress: Progress, result: Evaluation, sets: dict[str, dict], writer: Writer
) -> None:
    """Puts the results of an evaluation on record, of the split and of more sets."""
    values = result.scalars()
    writer.evaluation(progress.step, values)
    for name, of_set in sets.items():
        writer.evaluation(progress.step, of_set, name)
    more = {"bad_eval_images": len(result.bad_images), "sets": sets}
    progress.evaluation = {**values, **more, "step": progress.step}
    if not progress.best or values["top1"] >= progress.best["top1"]:
        progress.best = progress.evaluation


def note_bad_images(progress: Progress, batch: dict, setup: Setup) -> None:
    """Puts images that could not be decoded on record, and says so once each."""
    for index in sorted(bad_indices(batch) - set(progress.bad_images)):
        progress.bad_images.append(index)
        output.say(
            f"warning: passed over {setup.train.source.name(index)}, which cannot be"
            f" decoded ({len(progress.bad_images)} so far)"
        )
